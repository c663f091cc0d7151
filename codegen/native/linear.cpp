// Dense layers of the same inputs, y = W x + b each. What is fixed when the source is emitted stands
// above: Model (the type of inputs, bias and results), Stored (that of weights), Product, GRAIN, the rows
// that lie together, and MOST, how many layers there can be.
#include <numeric>

struct Linear {
  const Model* x;               // [T, K]
  const Stored* weights[MOST];  // [N, K] each
  const Model* bias[MOST];      // [N], or null
  Model* out[MOST];             // [T, N]
  int64_t N[MOST];
  int64_t row[MOST];  // elements from one row of weights, or panel, to the next
  int64_t T, K;
  int64_t layers, threads;
};

// Rows of one layer that a thread computes at a time.
struct Task {
  int layer;
  int64_t from;
  int count;
};

// One call: what its threads share.
struct Run {
  const Linear& call;
  const int threads;
  const int64_t x_row = packed_row<Product>(call.K);
  const Scratch<Product::Input> x{call.T * x_row};
  // Small enough that each thread has a few tasks, and no less than a tile: sums do not depend on it.
  const int64_t width = std::clamp<int64_t>(
      std::accumulate(call.N, call.N + call.layers, int64_t(0)) / (4 * threads) / GRAIN * GRAIN, GRAIN,
      Product::PANEL);

  int64_t tasks(int layer) const { return (call.N[layer] + width - 1) / width; }

  int64_t tasks() const {
    int64_t sum = 0;
    for (int layer = 0; layer < call.layers; ++layer) sum += tasks(layer);
    return sum;
  }

  Task task(int64_t number) const {
    int layer = 0;
    for (; number >= tasks(layer); ++layer) number -= tasks(layer);
    int64_t from = number * width;
    return {layer, from, int(std::min(width, call.N[layer] - from))};
  }

  Rows<Stored> weights(const Task& task) const {
    return Product::at(call.weights[task.layer], call.row[task.layer], task.from);
  }

  void pack(int64_t token) const {
    pack_row<Product>(call.x + token * call.K, call.K, x.memory + token * x_row);
  }

  // Some outputs of all tokens.
  void compute(const Task& task, const Task& next_task, float* products) const {
    const Model* biases = call.bias[task.layer];
    float bias[Product::PANEL] = {};
    for (int r = 0; biases && r < task.count; ++r) bias[r] = widen1(biases[task.from + r]);
    for (int64_t first = 0; first < call.T; first += CHUNK) {
      int tokens = int(std::min<int64_t>(CHUNK, call.T - first));
      const Product::Input* inputs[CHUNK];
      for (int t = 0; t < tokens; ++t) inputs[t] = x.memory + (first + t) * x_row;
      Rows<Stored> own = weights(task), next = first + CHUNK < call.T ? own : weights(next_task);
      Product::product(own, task.count, next, inputs, tokens, call.K, products, Product::PANEL);
      for (int t = 0; t < tokens; ++t) {
        Model* out = call.out[task.layer] + (first + t) * call.N[task.layer] + task.from;
        for (int r = 0; r < task.count; ++r)
          out[r] = narrow<Model>(products[t * Product::PANEL + r] + bias[r]);
      }
    }
  }
};

static Team team;

static void run(const Linear& call) {
  int64_t start = nanoseconds();
  const Run run{call, team.size(call.threads, start)};
  std::atomic<int64_t> counter{0};
  Waits waits(run.threads);
#pragma omp parallel num_threads(run.threads)
  {
    alignas(64) float products[CHUNK * Product::PANEL];
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < call.T; ++t) run.pack(t);
    waits.meet();
    share(counter, run.tasks(), counter++,
          [&](int64_t now, int64_t next) { run.compute(run.task(now), run.task(next), products); });
    waits.leave();
  }
  int64_t end = nanoseconds();
  if (run.threads > 1) team.record(call.threads, run.threads, start, end, waits.median(end));
}

// Returns 0, or 1 when there is not enough memory.
extern "C" int moecc_linear(const Linear* call) {
  try {
    run(*call);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
