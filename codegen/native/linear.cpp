// One dense layer, y = W x + b. What is fixed when the source is emitted stands above: Model (the type
// of inputs, bias and results), Stored (that of weights), Product, and GRAIN, the rows that lie together.

struct Linear {
  const Model* x;        // [T, K]
  const Stored* weights;  // [N, K]
  const Model* bias;     // [N], or null
  Model* out;            // [T, N]
  int64_t T, K, N;
  int64_t row;  // elements from one row of weights, or panel, to the next
  int64_t threads;
};

// One call: what its threads share.
struct Run {
  const Linear& layer;
  const int threads;
  const int64_t x_row = packed_row<Product>(layer.K);
  const Scratch<Product::Input> x{layer.T * x_row};
  // Small enough that each thread has a few tasks, and no less than a tile: sums do not depend on it.
  const int64_t width =
      std::clamp<int64_t>(layer.N / (4 * threads) / GRAIN * GRAIN, GRAIN, Product::PANEL);

  int64_t tasks() const { return (layer.N + width - 1) / width; }

  Rows<Stored> weights(int64_t task) const {
    return Product::at(layer.weights, layer.row, task * width);
  }

  void pack(int64_t token) const {
    pack_row<Product>(layer.x + token * layer.K, layer.K, x.memory + token * x_row);
  }

  // `width` outputs of all tokens.
  void compute(int64_t task, int64_t next_task, float* products) const {
    int64_t from = task * width;
    int count = int(std::min(width, layer.N - from));
    float bias[Product::PANEL] = {};
    for (int r = 0; layer.bias && r < count; ++r) bias[r] = widen1(layer.bias[from + r]);
    for (int64_t first = 0; first < layer.T; first += CHUNK) {
      int tokens = int(std::min<int64_t>(CHUNK, layer.T - first));
      const Product::Input* inputs[CHUNK];
      for (int t = 0; t < tokens; ++t) inputs[t] = x.memory + (first + t) * x_row;
      Rows<Stored> own = weights(task), next = first + CHUNK < layer.T ? own : weights(next_task);
      Product::product(own, count, next, inputs, tokens, layer.K, products, Product::PANEL);
      for (int t = 0; t < tokens; ++t) {
        Model* out = layer.out + (first + t) * layer.N + from;
        for (int r = 0; r < count; ++r)
          out[r] = narrow<Model>(products[t * Product::PANEL + r] + bias[r]);
      }
    }
  }
};

static Team team;

static void run(const Linear& layer) {
  int64_t start = nanoseconds();
  const Run run{layer, team.size(layer.threads, start)};
  std::atomic<int64_t> counter{0};
  Waits waits(run.threads);
#pragma omp parallel num_threads(run.threads)
  {
    alignas(64) float products[CHUNK * Product::PANEL];
#pragma omp for schedule(static) nowait
    for (int64_t t = 0; t < layer.T; ++t) run.pack(t);
    waits.meet();
    share(counter, run.tasks(),
          [&](int64_t task, int64_t next) { run.compute(task, next, products); });
    waits.leave();
  }
  int64_t end = nanoseconds();
  if (run.threads > 1) team.record(layer.threads, run.threads, start, end, waits.median(end));
}

// Returns 0, or 1 when there is not enough memory.
extern "C" int moecc_linear(const Linear* layer) {
  try {
    run(*layer);
    return 0;
  } catch (const std::bad_alloc&) {
    return 1;
  }
}
