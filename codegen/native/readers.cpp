// Readers of experts: a queue by priority, and the loop of the threads that serve it.
//
// Whoever computes in Python holds its lock for milliseconds. Reader threads that need the lock for
// each chunk wait that long between two chunks, and the disk idles; these need it for nothing that
// goes well. What does not (an error, the end of a file, a file that has changed, a checksum) and
// what nobody opened goes to Python, which retries, explains and counts.
#include <fcntl.h>
#include <pthread.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace {

using Lock = std::unique_lock<std::mutex>;

constexpr int64_t PAGE = 4096;  // direct reads move whole pages
constexpr int64_t NOBODY = -1;  // a file that could not be opened, or is to be read by Python

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

int64_t down(int64_t bytes) { return bytes / PAGE * PAGE; }
int64_t up(int64_t bytes) { return down(bytes + PAGE - 1); }

// zlib's crc32, eight bytes at a time.
uint32_t checksum(const uint8_t* data, int64_t size) {
  static const auto table = [] {
    std::array<std::array<uint32_t, 256>, 8> made{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t value = byte;
      for (int bit = 0; bit < 8; ++bit) value = value >> 1 ^ (value & 1 ? 0xedb88320u : 0);
      made[0][byte] = value;
    }
    for (int step = 1; step < 8; ++step)
      for (int byte = 0; byte < 256; ++byte) {
        uint32_t before = made[step - 1][byte];
        made[step][byte] = before >> 8 ^ made[0][before & 255];
      }
    return made;
  }();
  uint32_t sum = ~0u;
  for (; size >= 8; data += 8, size -= 8) {
    uint32_t first = sum;
    for (int byte = 0; byte < 4; ++byte) first ^= uint32_t(data[byte]) << 8 * byte;
    sum = 0;
    for (int byte = 0; byte < 4; ++byte)
      sum ^= table[7 - byte][first >> 8 * byte & 255] ^ table[3 - byte][data[4 + byte]];
  }
  for (; size; ++data, --size) sum = sum >> 8 ^ table[0][(sum ^ *data) & 255];
  return ~sum;
}

struct Stamp {
  int64_t device, inode, size, modified;

  bool is_of(int handle) const {
    struct stat status;
    if (fstat(handle, &status)) return false;
#ifdef __APPLE__
    timespec time = status.st_mtimespec;
#else
    timespec time = status.st_mtim;
#endif
    return device == int64_t(status.st_dev) && inode == int64_t(status.st_ino) &&
           size == status.st_size && modified == int64_t(time.tv_sec) * 1000000000 + time.tv_nsec;
  }
};

struct File { int64_t handle, direct; Stamp stamp; };

struct Range { int64_t file, offset, length, into; };

struct Chunk { int64_t range, start, length; };

struct Load {
  int64_t id, priority;
  uint8_t* record;
  int64_t size;      // of the record
  int64_t expected;  // its checksum; below zero, there is none
  std::vector<Range> ranges;
  std::vector<Chunk> left;  // taken from the end
  int64_t active = 0;       // chunks that somebody reads
  bool odd = false;         // Python has to check the record: it read a part, or the sum is wrong
  bool wanted = true;       // or it failed, or was stopped

  void cut(int64_t size) {
    for (int64_t range = int64_t(ranges.size()); range-- > 0;)
      for (int64_t length = ranges[range].length, start = (length - 1) / size * size; start >= 0;
           start -= size)
        left.push_back({range, start, std::min(size, length - start)});
  }

  void give_up() {
    left.clear();
    wanted = false;
  }
};

// A chunk that was read: what, by which thread, and when, on a clock that Python has, too.
struct Span {
  int64_t thread, file, offset, length;
  double from, to;
};

struct Queue {
  std::mutex mutex;
  std::condition_variable changed, ended;
  std::vector<File> files;
  std::map<int64_t, std::shared_ptr<Load>> loads;  // not done; ids ascend
  bool closed = false, paused = false;
  double limit, sent = 0, seconds = 0, since = 0;
  int64_t bytes = 0;
  bool watched = false;
  std::vector<Span> spans;  // while somebody watches

  std::shared_ptr<Load> next() {
    std::shared_ptr<Load> best;
    if (!paused)
      for (auto& [id, load] : loads)
        if (!load->left.empty() && (!best || load->priority < best->priority)) best = load;
    return best;
  }

  void remove(int64_t id) {
    if (loads.erase(id) && loads.empty()) seconds += now() - since;
    ended.notify_all();
  }
};

// Page-aligned memory of a thread, for bytes whose places in file and record do not agree.
class Bounce {
 public:
  ~Bounce() { free(held_); }
  uint8_t* of(int64_t size) {
    if (size > size_) {
      free(held_);
      held_ = static_cast<uint8_t*>(aligned_alloc(PAGE, size));
      size_ = held_ ? size : 0;
    }
    return held_;
  }

 private:
  uint8_t* held_ = nullptr;
  int64_t size_ = 0;
};

// Read until `needed` bytes are there; a read may return fewer, and then goes on at a unit.
bool fill(int handle, uint8_t* memory, int64_t size, int64_t offset, int64_t needed, int64_t unit) {
  for (int64_t done = 0; done < needed;) {
    int64_t start = done / unit * unit;
    ssize_t count = pread(handle, memory + start, size - start, offset + start);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 || start + count <= done) return false;
    done = start + count;
  }
  return true;
}

bool read(const File& file, const Range& range, const Chunk& chunk, uint8_t* record,
          Bounce& bounce) {
  int handle = int(file.handle);
  int64_t begin = range.offset + chunk.start, first = down(begin);
  int64_t whole = up(begin + chunk.length) - first;
  uint8_t* target = record + range.into + chunk.start;
  bool fits = first == begin && whole == chunk.length && !(uintptr_t(target) % PAGE);
  if (!file.direct || fits) {
    if (!fill(handle, target, chunk.length, begin, chunk.length, file.direct ? PAGE : 1))
      return false;
  } else {
    uint8_t* held = bounce.of(whole);
    if (!held || !fill(handle, held, whole, first, begin + chunk.length - first, PAGE))
      return false;
    memcpy(target, held + (begin - first), chunk.length);
  }
  return file.stamp.is_of(handle);
}

}  // namespace

// What a thread brings to Python: a chunk that it has to read, or a record that it has to check.
struct Task { int64_t id, range, start, length; double through; };
enum Kind : int64_t { CLOSED, READ, CHECK };


extern "C" {

Queue* moecc_readers_new(double limit) {
  Queue* queue = new Queue;
  queue->limit = limit;
  return queue;
}

void moecc_readers_free(Queue* queue) { delete queue; }

int64_t moecc_readers_open(Queue* queue, const File* file) {
  Lock lock(queue->mutex);
  queue->files.push_back(*file);
  return int64_t(queue->files.size()) - 1;
}

void moecc_readers_submit(Queue* queue, int64_t id, int64_t priority, uint8_t* record, int64_t size,
                          int64_t expected, int64_t count, const Range* ranges, int64_t chunk) {
  auto load = std::make_shared<Load>(Load{id, priority, record, size, expected, {}, {}});
  load->ranges.assign(ranges, ranges + count);
  load->cut(chunk);
  Lock lock(queue->mutex);
  if (queue->closed) return;
  if (queue->loads.empty()) queue->since = now();
  queue->loads[id] = load;
  queue->changed.notify_all();
}

void moecc_readers_promote(Queue* queue, int64_t id, int64_t priority) {
  Lock lock(queue->mutex);
  auto found = queue->loads.find(id);
  if (found != queue->loads.end()) found->second->priority = priority;
}

// Begin no more chunks of a load; it is done when those under way are.
void moecc_readers_stop(Queue* queue, int64_t id) {
  Lock lock(queue->mutex);
  auto found = queue->loads.find(id);
  if (found == queue->loads.end()) return;
  found->second->give_up();
  if (!found->second->active) queue->remove(id);
}

// Tell whether a load is done, after so many seconds at most.
int64_t moecc_readers_done(Queue* queue, int64_t id, double wait) {
  Lock lock(queue->mutex);
  auto done = [&] { return !queue->loads.count(id); };
  if (wait <= 0) return done();
  return queue->ended.wait_for(lock, std::chrono::duration<double>(wait), done);
}

// End a chunk that was taken; CHECK if Python has to look at its record before the load is done.
int64_t moecc_readers_finish(Queue* queue, const Task* task, int64_t failed) {
  double rest = task->through - now();
  if (rest > 0) std::this_thread::sleep_for(std::chrono::duration<double>(rest));
  Lock lock(queue->mutex);
  std::shared_ptr<Load> load = queue->loads.at(task->id);
  if (failed) load->give_up();
  else queue->bytes += task->length;
  if (load->wanted && load->expected >= 0 && load->active == 1 && load->left.empty()) {
    if (!load->odd) {
      lock.unlock();
      bool wrong = checksum(load->record, load->size) != load->expected;
      lock.lock();
      load->odd = wrong;
    }
    if (load->odd) return CHECK;  // and stays active until then
  }
  --load->active;
  if (!load->active && load->left.empty()) queue->remove(task->id);
  if (queue->paused) queue->changed.notify_all();
  return CLOSED;
}

// What Python says of a record that it checked: that it is done, or to be read again.
void moecc_readers_checked(Queue* queue, const Task* task, int64_t again, int64_t chunk) {
  Lock lock(queue->mutex);
  std::shared_ptr<Load> load = queue->loads.at(task->id);
  --load->active;
  load->odd = false;
  if (again && load->wanted) load->cut(chunk);  // it may have been stopped, or the queue closed
  else queue->remove(task->id);
  queue->changed.notify_all();
}

// Serve the queue until it is closed, or there is something for Python, which `task` says then.
int64_t moecc_readers_work(Queue* queue, Task* task) {
  Bounce bounce;
  Lock lock(queue->mutex);
  while (!queue->closed) {
    std::shared_ptr<Load> load = queue->next();
    if (!load) {
      queue->changed.wait(lock);
      continue;
    }
    Chunk chunk = load->left.back();
    load->left.pop_back();
    ++load->active;
    Range range = load->ranges[chunk.range];
    *task = {load->id, chunk.range, chunk.start, chunk.length, 0};
    if (queue->limit > 0) {  // bytes that are sent now pass the wire behind those under way
      queue->sent = std::max(queue->sent, now()) + double(chunk.length) / queue->limit;
      task->through = queue->sent;
    }
    bool whole = false;
    if (range.file != NOBODY) {
      File file = queue->files[range.file];
      lock.unlock();
      double from = now();
      whole = read(file, range, chunk, load->record, bounce);
      Span span{int64_t(pthread_self()), range.file, range.offset + chunk.start, chunk.length, from,
                now()};
      lock.lock();
      if (queue->watched) queue->spans.push_back(span);
      lock.unlock();
      if (whole && moecc_readers_finish(queue, task, false) == CHECK) return CHECK;
      lock.lock();
    }
    if (!whole) {
      load->odd = true;
      return READ;
    }
  }
  return CLOSED;
}

// Note the chunks that are read from now on, or no longer.
void moecc_readers_watch(Queue* queue, int64_t watched) {
  Lock lock(queue->mutex);
  queue->watched = watched;
}

// Take as many of those that were noted as there is room for; tell how many there were.
int64_t moecc_readers_seen(Queue* queue, int64_t room, Span* spans) {
  Lock lock(queue->mutex);
  int64_t count = int64_t(queue->spans.size());
  if (count > room) return count;
  std::copy(queue->spans.begin(), queue->spans.end(), spans);
  queue->spans.clear();
  return count;
}

void moecc_readers_limit(Queue* queue, double limit) {
  Lock lock(queue->mutex);
  queue->limit = limit;
}

// Bytes so far, and seconds in which at least one load was on its way.
void moecc_readers_counts(Queue* queue, double* counts) {
  Lock lock(queue->mutex);
  counts[0] = double(queue->bytes);
  counts[1] = queue->seconds + (queue->loads.empty() ? 0 : now() - queue->since);
}

// Let chunks under way end, and keep readers from the next.
void moecc_readers_pause(Queue* queue) {
  Lock lock(queue->mutex);
  queue->paused = true;
  queue->changed.wait(lock, [&] {
    return std::none_of(queue->loads.begin(), queue->loads.end(),
                        [](auto& one) { return one.second->active > 0; });
  });
}

void moecc_readers_resume(Queue* queue) {
  Lock lock(queue->mutex);
  queue->paused = false;
  queue->changed.notify_all();
}

// Drop what is on its way, and let the readers go.
void moecc_readers_close(Queue* queue) {
  Lock lock(queue->mutex);
  queue->closed = true;
  for (auto one = queue->loads.begin(); one != queue->loads.end();) {
    Load& load = *(one++)->second;
    load.give_up();
    if (!load.active) queue->remove(load.id);
  }
  queue->changed.notify_all();
}

}
