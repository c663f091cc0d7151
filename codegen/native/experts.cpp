// One MoE layer: route, first product and activation, second product and weighted sum.
// What is fixed when the source is emitted stands above: Model (the type of hidden states, biases and
// results), Stored (that of weights), First and Second (each product, with its own blocks, and its own
// order and type of inputs), GATED, INTERLEAVED, BIAS, LEARNED and activate(). Shapes, strides and
// the number of threads are arguments.

#include <utility>
#include <vector>

constexpr int OUTPUTS = GATED ? First::PANEL / 2 : First::PANEL;  // activated values a task makes
// A task of the first product writes whole lines of the second's inputs.
static_assert(OUTPUTS % Second::LENGTH == 0 && OUTPUTS % LANES == 0);

struct Layer {
  const Model* hidden;       // [T, H]
  const int64_t* ids;         // [T, K]
  const float* weights;       // [T, K]
  const Stored* first;        // [E, rows, H], or [E, H, rows] if TRANSPOSED; gates if `up` is set
  const Stored* up;           // [E, I, H], or [E, H, I]; null: the second half of first's rows
  const Stored* second;       // [E, H, I], or [E, I, H] if DOWN_TRANSPOSED
  const Model* first_bias;   // [E, rows]
  const Model* second_bias;  // [E, H]
  const Model* learned;      // [E, I], what the activation reads besides
  void* out;                  // [T, H] of Model, or of float
  int64_t T, K, H, I, E;
  // Strides, in elements. Those of up are first's where it is null.
  int64_t first_expert, first_row, up_expert, up_row, second_expert, second_row;
  int64_t out_float;
  int64_t threads;
  const int64_t* slots;  // [E]: where each expert lies in first, up and second; none where negative
  int64_t onto;          // add to what is in `out`, which is float
};

// The (token, slot) pairs of each active expert, experts ascending, tokens ascending.
struct Routing {
  std::vector<int64_t> expert;  // of each active expert
  std::vector<int64_t> slot;    // where its weights are
  std::vector<int64_t> begin;   // its first pair; one more entry at the end
  std::vector<int64_t> token;   // of each pair
  std::vector<float> weight;

  explicit Routing(const Layer& layer) {
    std::vector<int64_t> fill(layer.E, 0);
    int64_t slots = layer.T * layer.K, pairs = 0;
    auto valid = [&](int64_t id) {
      return uint64_t(id) < uint64_t(layer.E) && (!layer.slots || layer.slots[id] >= 0);
    };
    for (int64_t s = 0; s < slots; ++s)
      if (valid(layer.ids[s])) ++fill[layer.ids[s]];
    for (int64_t e = 0; e < layer.E; ++e) {
      if (!fill[e]) continue;
      expert.push_back(e);
      slot.push_back(layer.slots ? layer.slots[e] : e);
      begin.push_back(pairs);
      pairs += std::exchange(fill[e], pairs);
    }
    begin.push_back(pairs);
    token.resize(pairs);
    weight.resize(pairs);
    for (int64_t s = 0; s < slots; ++s) {
      if (!valid(layer.ids[s])) continue;
      int64_t pair = fill[layer.ids[s]]++;
      token[pair] = s / layer.K;
      weight[pair] = layer.weights[s];
    }
  }
};

// Apply the bias and the activation to one token's first products, and pack the result in the
// second product's order.
static void finish(const float* products, const Model* bias, int64_t gap, const Model* learned,
                   int count, Second::Input* packed) {
  alignas(64) float one[OUTPUTS] = {}, two[OUTPUTS] = {}, own[OUTPUTS] = {}, result[OUTPUTS] = {};
  constexpr int step = GATED && INTERLEAVED ? 2 : 1, other = INTERLEAVED ? 1 : OUTPUTS;
  for (int i = 0; i < count; ++i) {
    one[i] = products[i * step] + (BIAS ? widen1(bias[i * step]) : 0.f);
    if (GATED) two[i] = products[i * step + other] + (BIAS ? widen1(bias[i * step + gap]) : 0.f);
    if (LEARNED) own[i] = widen1(learned[i]);
  }
  for (int i = 0; i < count; i += LANES)
    store(result + i, activate(load(one + i), load(two + i), load(own + i)));
  for (int i = count; i < OUTPUTS; ++i) result[i] = 0;
  for (int i = 0; i < count; i += Second::LENGTH)
    Second::pack(result + i, packed + i / Second::LENGTH * Second::UNITS);
}

// One call: what its two phases share.
struct Run {
  const Layer& layer;
  const Routing routing{layer};
  const int64_t experts = int64_t(routing.expert.size());
  const int64_t x_row = packed_row<First>(layer.H), h_row = packed_row<Second>(layer.I);
  const Scratch<First::Input> x{layer.T * x_row};
  const Scratch<Second::Input> h{routing.begin.back() * h_row};
  const Scratch<float> own_sums{layer.out_float ? 0 : layer.T * layer.H};
  float* const sums = layer.out_float ? static_cast<float*>(layer.out) : own_sums.memory;
  const int64_t panels = (layer.I + OUTPUTS - 1) / OUTPUTS;  // of an expert's first product
  const Stored* const ups =
      layer.up ? layer.up : First::at(layer.first, layer.first_row, layer.I).begin;

  int64_t first_tasks() const { return panels * experts; }
  int64_t second_tasks() const { return (layer.H + Second::PANEL - 1) / Second::PANEL; }

  // Where the weights of a task begin: what the task before it reads ahead.
  Rows<Stored> first_weights(int64_t task) const {
    int64_t row = task % panels * OUTPUTS * (GATED && INTERLEAVED ? 2 : 1);
    const Stored* expert = layer.first + routing.slot[task / panels] * layer.first_expert;
    return First::at(expert, layer.first_row, row);
  }
  Rows<Stored> up_weights(int64_t task) const {
    const Stored* expert = ups + routing.slot[task / panels] * layer.up_expert;
    return First::at(expert, layer.up_row, task % panels * OUTPUTS);
  }
  Rows<Stored> second_weights(int64_t task, int64_t active) const {
    const Stored* expert = layer.second + routing.slot[active] * layer.second_expert;
    return Second::at(expert, layer.second_row, task * Second::PANEL);
  }

  void pack(int64_t token) const {
    pack_row<First>(layer.hidden + token * layer.H, layer.H, x.memory + token * x_row);
  }

  // OUTPUTS intermediate values of all tokens of one active expert. The thread will go on with
  // `next_task`, or if that is this one, with task `begin` of the second product.
  void first(int64_t task, int64_t next_task, int64_t begin, float* products) const {
    int64_t active = task / panels, from = task % panels * OUTPUTS;
    int count = int(std::min<int64_t>(OUTPUTS, layer.I - from));
    Rows<Stored> gate = first_weights(task), up = up_weights(task);
    Rows<Stored> next = next_task != task ? first_weights(next_task) : second_weights(begin, 0);
    int64_t rows = GATED ? 2 * layer.I : layer.I, row = GATED && INTERLEAVED ? 2 * from : from;
    const Model* bias =
        BIAS ? layer.first_bias + routing.expert[active] * rows + row : nullptr;
    const Model* learned =
        LEARNED ? layer.learned + routing.expert[active] * layer.I + from : nullptr;
    int64_t end = routing.begin[active + 1];
    for (int64_t p = routing.begin[active]; p < end; p += CHUNK) {
      int tokens = int(std::min<int64_t>(CHUNK, end - p));
      const First::Input* inputs[CHUNK];
      for (int t = 0; t < tokens; ++t) inputs[t] = x.memory + routing.token[p + t] * x_row;
      Rows<Stored> ahead = p + CHUNK < end ? gate : next;
      auto multiply = [&](Rows<Stored> weights, int n, Rows<Stored> after, float* to) {
        First::product(weights, n, after, inputs, tokens, layer.H, to, First::PANEL);
      };
      if (GATED && !INTERLEAVED) {
        multiply(gate, count, up, products);
        multiply(up, count, ahead, products + OUTPUTS);
      } else {
        multiply(gate, GATED ? 2 * count : count, ahead, products);
      }
      for (int t = 0; t < tokens; ++t)
        finish(products + t * First::PANEL, bias, INTERLEAVED ? 1 : layer.I, learned, count,
               h.memory + (p + t) * h_row + from / Second::LENGTH * Second::UNITS);
    }
  }

  // A panel of outputs of all tokens; experts add to them in ascending order.
  void second(int64_t task, int64_t next_task, float* products) const {
    constexpr int width = Second::PANEL;
    int64_t from = task * width;
    int count = int(std::min<int64_t>(width, layer.H - from));
    for (int64_t t = 0; !layer.onto && t < layer.T; ++t)
      memset(sums + t * layer.H + from, 0, count * sizeof(float));
    for (int64_t a = 0; a < experts; ++a) {
      Rows<Stored> weights = second_weights(task, a);
      Rows<Stored> next =
          a + 1 < experts ? second_weights(task, a + 1) : second_weights(next_task, 0);
      const Model* bias =
          BIAS ? layer.second_bias + routing.expert[a] * layer.H + from : nullptr;
      int64_t end = routing.begin[a + 1];
      for (int64_t p = routing.begin[a]; p < end; p += CHUNK) {
        int tokens = int(std::min<int64_t>(CHUNK, end - p));
        const Second::Input* inputs[CHUNK];
        for (int t = 0; t < tokens; ++t) inputs[t] = h.memory + (p + t) * h_row;
        Second::product(weights, count, p + CHUNK < end ? weights : next, inputs, tokens, layer.I,
                        products, width);
        for (int t = 0; t < tokens; ++t) {
          float* sum = sums + routing.token[p + t] * layer.H + from;
          float weight = routing.weight[p + t];
          for (int r = 0; r < count; ++r)
            sum[r] += weight * (products[t * width + r] + (BIAS ? widen1(bias[r]) : 0.f));
        }
      }
    }
    if (layer.out_float) return;  // `sums` is the output
    for (int64_t t = 0; t < layer.T; ++t) {
      Model* out = static_cast<Model*>(layer.out) + t * layer.H + from;
      for (int r = 0; r < count; ++r) out[r] = narrow<Model>(sums[t * layer.H + from + r]);
    }
  }
};

static Team team;

static void run(const Layer& layer) {
  const Run run{layer};
  std::atomic<int64_t> first{0}, second{0};
  int64_t start = nanoseconds();
  int threads = team.size(layer.threads, start);
  Waits waits(threads);
#pragma omp parallel num_threads(threads)
  {
    alignas(64) float products[CHUNK * std::max(First::PANEL, Second::PANEL)];
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < layer.T; ++t) run.pack(t);
    waits.meet();
    // With its last task of the first product a thread reads ahead for the second: memory is not idle
    // while threads meet.
    int64_t begin = second++;
    share(first, run.first_tasks(), first++,
          [&](int64_t task, int64_t next) { run.first(task, next, begin, products); });
    waits.meet();
    share(second, run.second_tasks(), begin,
          [&](int64_t task, int64_t next) { run.second(task, next, products); });
    waits.leave();
  }
  int64_t end = nanoseconds();
  if (threads > 1) team.record(layer.threads, threads, start, end, waits.median(end));
}

// Returns 0, or 1 when there is not enough memory.
extern "C" int moecc_experts(const Layer* layer) {
  try {
    run(*layer);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
