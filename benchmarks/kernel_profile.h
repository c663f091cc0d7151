// What benchmarks/kernel_profile.py puts before experts.cpp in the source of a kernel.

// The nanoseconds at which a region begins and ends, and at which each of its threads comes to a meeting,
// goes on, and leaves.
class StampedWaits : public Waits {
 public:
  static constexpr int STAMPS = 5;
  struct Call {
    int64_t began, ended;
    std::vector<int64_t> stamps;  // of each thread in turn
  };
  static Call& last() {
    static Call call;
    return call;
  }

  explicit StampedWaits(int threads) : Waits(threads), each_(threads) {
    last().began = nanoseconds();
  }
  ~StampedWaits() {
    last().ended = nanoseconds();
    last().stamps.clear();
    for (const Thread& one : each_)
      last().stamps.insert(last().stamps.end(), one.at, one.at + STAMPS);
  }
  void meet() {
    stamp();
    Waits::meet();
    stamp();
  }
  void leave() {
    Waits::leave();
    stamp();
  }

 private:
  struct alignas(64) Thread {
    int64_t at[STAMPS];
    int count = 0;
  };
  void stamp() {
    Thread& own = each_[omp_get_thread_num()];
    own.at[own.count++] = nanoseconds();
  }
  std::vector<Thread> each_;
};
#define Waits StampedWaits

// Write when the last call's region began and ended, and each thread's stamps; return the threads.
extern "C" int moecc_stamps(int64_t* to) {
  const StampedWaits::Call& call = StampedWaits::last();
  *to++ = call.began;
  *to++ = call.ended;
  std::copy(call.stamps.begin(), call.stamps.end(), to);
  return int(call.stamps.size() / StampedWaits::STAMPS);
}

#ifdef READING
// A product that reads its weights in the product's order, as far ahead, and computes nothing.
template <class Product>
struct Reading : Product {
  // Packed weights lie in panels of 16 rows, `stride` bytes each; others row by row.
  static constexpr int GROUP = sizeof(Stored) == 1 ? 16 : 1;

  static void product(Rows<Stored> weights, int rows, Rows<Stored> next,
                      const typename Product::Input* const*, int tokens, int64_t length, float* out,
                      int width) {
    int64_t size = GROUP == 1 ? length * int64_t(sizeof(Stored)) : weights.stride;
    vi sum = {};
    for (int row = 0; row < rows; row += GROUP) {
      const char* from = (const char*)Product::at(weights.begin, weights.stride, row).begin;
      const Stored* after = GROUP > 1 && row + GROUP < rows
                                ? Product::at(weights.begin, weights.stride, row + GROUP).begin
                                : Product::at(next.begin, next.stride, GROUP > 1 ? 0 : row).begin;
      for (int64_t at = 0; at < size; at += LINE_BYTES) {
        __builtin_prefetch((const char*)after + at, 0, 2);
#pragma GCC unroll 4
        for (int part = 0; part < LINE_BYTES; part += sizeof(vi))
          sum ^= load_as<vi>(from + at + part);
      }
    }
    asm volatile("" : : "m"(sum));  // somebody wants it
    for (int t = 0; t < tokens; ++t) std::fill_n(out + t * width, rows, 0.f);
  }
};
using ReadingFirst = Reading<First>;
using ReadingSecond = Reading<Second>;
#define First ReadingFirst
#define Second ReadingSecond
#endif
