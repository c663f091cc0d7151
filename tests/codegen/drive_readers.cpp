// Use the queue of readers from several threads at once, for the thread sanitizer to watch.
#include READERS

#include <atomic>
#include <cstdio>
#include <string>

namespace {

constexpr int64_t EXPERTS = 40, SIZE = 3 * PAGE + 777, CHUNK = PAGE, LOADS = 400, SLOTS = 8;

uint8_t byte_of(int64_t expert, int64_t place) { return uint8_t(expert * 31 + place * 7 + place / 256); }

std::atomic<int> again{20};  // so many records are read twice

// What Python's threads do: stay in `work`, and read and check what comes back.
void serve(Queue* queue, int handle) {
  Task task;
  while (int64_t why = moecc_readers_work(queue, &task)) {
    if (why == READ) {
      Lock lock(queue->mutex);
      Load& load = *queue->loads.at(task.id);
      uint8_t* record = load.record;
      Range range = load.ranges[task.range];
      lock.unlock();
      if (pread(handle, record + range.into + task.start, task.length, range.offset + task.start) !=
          task.length)
        abort();
      if (moecc_readers_finish(queue, &task, false) != CHECK) continue;
    }
    moecc_readers_checked(queue, &task, again-- > 0, CHUNK);
  }
}

}  // namespace

int main(int, char** arguments) {
  int handle = open(arguments[1], O_RDWR | O_CREAT | O_TRUNC, 0600);
  std::vector<uint32_t> sums;
  for (int64_t expert = 0; expert < EXPERTS; ++expert) {
    std::string data(SIZE, 0);
    for (int64_t place = 0; place < SIZE; ++place) data[place] = char(byte_of(expert, place));
    if (pwrite(handle, data.data(), SIZE, expert * SIZE) != SIZE) return 2;
    sums.push_back(checksum(reinterpret_cast<uint8_t*>(&data[0]), SIZE));
  }
  struct stat status;
  fstat(handle, &status);
  int64_t time = int64_t(status.st_mtim.tv_sec) * 1000000000 + status.st_mtim.tv_nsec;
  File file{handle, 0, {int64_t(status.st_dev), int64_t(status.st_ino), status.st_size, time}};

  Queue* queue = moecc_readers_new(0);
  int64_t name = moecc_readers_open(queue, &file);
  std::vector<std::thread> threads;
  for (int count = 0; count < 4; ++count) threads.emplace_back(serve, queue, handle);
  std::vector<std::vector<uint8_t>> slots(SLOTS, std::vector<uint8_t>(SIZE));
  std::vector<int64_t> expert_of(SLOTS, -1);
  int64_t wrong = 0, seed = 1;
  for (int64_t id = 0; id < LOADS; ++id) {
    int64_t slot = id % SLOTS, before = id - SLOTS;
    if (before >= 0) {
      moecc_readers_promote(queue, before, 0);
      bool stopped = before % 5 == 0;
      if (stopped) moecc_readers_stop(queue, before);
      while (!moecc_readers_done(queue, before, 0.01)) continue;
      for (int64_t place = 0; place < SIZE && !stopped; ++place)
        wrong += slots[slot][place] != byte_of(expert_of[slot], place);
    }
    seed = seed * 48271 % 2147483647;
    expert_of[slot] = seed % EXPERTS;
    std::fill(slots[slot].begin(), slots[slot].end(), 0);
    Range range{id % 7 ? name : NOBODY, expert_of[slot] * SIZE, SIZE, 0};
    moecc_readers_submit(queue, id, 1 + id % 3, slots[slot].data(), SIZE,
                         id % 2 ? sums[expert_of[slot]] : -1, 1, &range, CHUNK);
    if (id % 50 == 0) {
      moecc_readers_pause(queue);
      for (auto& one : slots) one[0] ^= 0;  // nobody writes now, or it is a race
      double counts[2];
      moecc_readers_counts(queue, counts);
      moecc_readers_limit(queue, id % 100 ? 0 : 1e9);
      moecc_readers_resume(queue);
    }
  }
  moecc_readers_close(queue);
  for (auto& thread : threads) thread.join();
  moecc_readers_free(queue);
  printf("%lld bytes are wrong\n", static_cast<long long>(wrong));
  return wrong ? 1 : 0;
}
