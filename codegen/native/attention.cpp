// Attention of few query tokens, softmax(scale q k^T + mask) v, over keys and values as a cache has
// them. Model, the type of all but a bool mask, stands above.
//
// A part is KEYS keys of one head. It is read once for all query heads that share it, and leaves a
// maximum, a sum of powers and a weighted sum of values for each row, which is one query head of one
// token. Parts are then put together in ascending order; since they do not depend on the number of
// threads, results do not either.

using Scores = Dot<Model>;
using Values = Axpy<Model>;

constexpr int64_t KEYS = 128;
constexpr float CLOSED = -__builtin_inff();
enum MaskKind : int64_t { NONE, OPEN, ADDED };  // none, true where open, floats that are added

struct Strides { int64_t batch, head, token; };

struct Attention {
  const Model* query;  // [B, heads * shared, T, D]
  const Model* key;    // [B, heads, S, D]
  const Model* value;  // [B, heads, S, V]
  const void* mask;    // [B, heads * shared, T, S]
  Model* out;          // [B, T, heads * shared, V]
  int64_t B, heads, shared, T, S, D, V;
  Strides query_step, key_step, value_step, mask_step;  // in elements
  int64_t mask_key;  // from one key of the mask to the next; 1 for all others' last dimension
  int64_t mask_kind, causal;
  int64_t scale;  // the bits of a double
  int64_t threads;
};

// One call: what its two phases share.
struct Run {
  const Attention& call;
  const int threads;
  const float scale = float(bitcast<double>(call.scale));
  const int64_t rows = call.shared * call.T;
  const int64_t parts = (call.S + KEYS - 1) / KEYS;
  const int64_t width = (call.V + LANES - 1) / LANES * LANES;
  const int64_t result = rows * (width + 2);  // of a part: values, then maxima, then sums
  const int64_t lines = call.mask_step.head ? rows : call.T;  // of the mask that differ
  const int64_t x_row = packed_row<Scores>(call.D);
  const int64_t own = (rows + lines) * KEYS + width;  // floats of a thread
  const Scratch<float> results{call.B * call.heads * parts * result};
  const Scratch<float> floats{threads * own};
  const Scratch<Scores::Input> inputs{threads * rows * x_row};

  int64_t tasks() const { return call.B * call.heads * parts; }

  // What is added to the score of a key.
  float added(int64_t batch, int64_t query, int64_t token, int64_t key) const {
    if (call.causal && key > token) return CLOSED;
    if (call.mask_kind == NONE) return 0;
    const Strides& step = call.mask_step;
    int64_t at = batch * step.batch + query * step.head + token * step.token + key * call.mask_key;
    if (call.mask_kind == OPEN) return static_cast<const uint8_t*>(call.mask)[at] ? 0 : CLOSED;
    return widen1(static_cast<const Model*>(call.mask)[at]);
  }

  // Powers of one row's scores, up to the next whole vector; gives their maximum and sum.
  void soften(float* scores, const float* mask, int64_t count, float* most, float* sum) const {
    int64_t filled = (count + LANES - 1) / LANES * LANES;
    for (int64_t s = 0; s < count; ++s) scores[s] = scores[s] * scale + mask[s];
    for (int64_t s = count; s < filled; ++s) scores[s] = CLOSED;
    vf tops = splat(CLOSED);
    for (int64_t s = 0; s < filled; s += LANES)
      tops = select(load(scores + s) > tops, load(scores + s), tops);
    float top = CLOSED;
    for (int lane = 0; lane < LANES; ++lane) top = tops[lane] > top ? tops[lane] : top;
    *most = top == CLOSED ? 0 : top;  // all powers are 0 then, but for NaN
    vf sums = {};
    for (int64_t s = 0; s < filled; s += LANES) {
      vf power = exp_(load(scores + s) - splat(*most));
      store(scores + s, power);
      sums += power;
    }
    *sum = sum_lanes(sums);
  }

  // The keys of one part for all rows of their head.
  void part(int64_t task, int thread) const {
    int64_t batch = task / parts / call.heads, head = task / parts % call.heads;
    int64_t from = task % parts * KEYS, to = std::min(from + KEYS, call.S);
    float* values = results.memory + task * result;
    float *most = values + rows * width, *sums = most + rows;
    float *scores = floats.memory + thread * own, *masks = scores + rows * KEYS;
    int64_t first = to, last = from;  // keys that are open to any row
    for (int64_t line = 0; line < lines; ++line)
      for (int64_t s = from; s < to; ++s) {
        int64_t query = head * call.shared + line / call.T;
        float mask = masks[line * KEYS + s - from] = added(batch, query, line % call.T, s);
        if (mask != CLOSED) first = std::min(first, s), last = std::max(last, s + 1);
      }
    if (first >= last) {  // closed, as the end of a static cache is: nothing is read
      for (int64_t r = 0; r < rows; ++r) sums[r] = 0;
      return;
    }
    const Strides &q = call.query_step, &k = call.key_step, &v = call.value_step;
    Scores::Input* x = inputs.memory + thread * rows * x_row;
    for (int64_t r = 0; r < rows; ++r) {
      int64_t query = head * call.shared + r / call.T, token = r % call.T;
      pack_row<Scores>(call.query + batch * q.batch + query * q.head + token * q.token, call.D,
                       x + r * x_row);
    }
    int count = int(last - first);
    Rows<Model> keys = {call.key + batch * k.batch + head * k.head + first * k.token, k.token};
    Rows<Model> own_values = {call.value + batch * v.batch + head * v.head + first * v.token, v.token};
    for (int64_t begin = 0; begin < rows; begin += CHUNK) {
      int some = int(std::min<int64_t>(CHUNK, rows - begin));
      const Scores::Input* queries[CHUNK];
      const float* powers[CHUNK];
      for (int r = 0; r < some; ++r) {
        queries[r] = x + (begin + r) * x_row;
        powers[r] = scores + (begin + r) * KEYS;
      }
      float* chunk = scores + begin * KEYS;
      Scores::product(keys, count, own_values, queries, some, call.D, chunk, KEYS);
      for (int64_t r = begin; r < begin + some; ++r)
        soften(scores + r * KEYS, masks + (lines == rows ? r : r % call.T) * KEYS + first - from,
               count, most + r, sums + r);
      Values::product(own_values, int(call.V), keys, powers, some, count, values + begin * width,
                      int(width));
    }
  }

  // One row's parts together. A row without an open key is 0, as it is in torch.
  void combine(int64_t row, int thread) const {
    int64_t batch = row / rows / call.heads, head = row / rows % call.heads, r = row % rows;
    const float* first = results.memory + row / rows * parts * result;
    float *line = floats.memory + thread * own, top = CLOSED, total = 0;
    auto sum = [&](int64_t p) { return first[p * result + rows * (width + 1) + r]; };
    auto most = [&](int64_t p) { return first[p * result + rows * width + r]; };
    for (int64_t p = 0; p < parts; ++p)
      if (sum(p) != 0) top = most(p) > top ? most(p) : top;
    for (int64_t i = 0; i < width; ++i) line[i] = 0;
    for (int64_t p = 0; p < parts; ++p) {
      if (sum(p) == 0) continue;
      float weight = exp_(splat(most(p) - top))[0];
      total += weight * sum(p);
      for (int64_t i = 0; i < width; ++i) line[i] += weight * first[p * result + r * width + i];
    }
    int64_t query = head * call.shared + r / call.T, token = r % call.T;
    int64_t place = (batch * call.T + token) * call.heads * call.shared + query;
    for (int64_t i = 0; i < call.V; ++i)
      call.out[place * call.V + i] = narrow<Model>(total == 0 ? 0 : line[i] / total);
  }
};

static Team team;

static void run(const Attention& call) {
  int64_t start = nanoseconds();
  const Run run{call, team.size(call.threads, start)};
  std::atomic<int64_t> counter{0};
  Waits waits(run.threads);
#pragma omp parallel num_threads(run.threads)
  {
    int thread = omp_get_thread_num();
    share(counter, run.tasks(), counter++, [&](int64_t task, int64_t) { run.part(task, thread); });
    waits.meet();
#pragma omp for schedule(static) nowait
    for (int64_t row = 0; row < call.B * call.heads * run.rows; ++row) run.combine(row, thread);
    waits.leave();
  }
  int64_t end = nanoseconds();
  if (run.threads > 1) team.record(call.threads, run.threads, start, end, waits.median(end));
}

// Returns 0, or 1 when there is not enough memory.
extern "C" int moecc_attention(const Attention* call) {
  try {
    run(*call);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
