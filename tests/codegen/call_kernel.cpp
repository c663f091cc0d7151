// Call a kernel of a library once: call_kernel LIBRARY NAME CASE RESULT
//
// CASE holds the words of the kernel's argument, each as two int64: -1 and a number, or a size and
// an offset, followed by so many bytes. Each buffer is allocated alone and as large as it says, so
// that the address sanitizer sees whoever leaves it. RESULT gets all buffers as they are afterwards.
#include <dlfcn.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <utility>
#include <vector>

static void* buffer(FILE* file, int64_t size, int64_t offset) {
  // Right-aligned: bytes after the last are never there, whatever the size.
  char* memory = static_cast<char*>(malloc(size + offset)) + offset;
  if (fread(memory, 1, size, file) != size_t(size)) exit(3);
  return memory;
}

int main(int count, char** arguments) {
  if (count != 5) return 2;
  void* library = dlopen(arguments[1], RTLD_NOW);
  if (!library) return fprintf(stderr, "%s\n", dlerror()), 2;
  auto kernel = reinterpret_cast<int (*)(const void*)>(dlsym(library, arguments[2]));
  FILE* file = fopen(arguments[3], "rb");
  std::vector<void*> words;
  std::vector<std::pair<void*, size_t>> buffers;
  int64_t pair[2];
  while (fread(pair, 8, 2, file) == 2) {
    if (pair[0] >= 0) buffers.emplace_back(buffer(file, pair[0], pair[1]), pair[0]);
    words.push_back(pair[0] >= 0 ? buffers.back().first : reinterpret_cast<void*>(pair[1]));
  }
  if (int failed = kernel(words.data())) return fprintf(stderr, "kernel: %d\n", failed), 4;
  FILE* result = fopen(arguments[4], "wb");
  for (auto [memory, size] : buffers)
    if (fwrite(memory, 1, size, result) != size) return 5;
  return fclose(result) ? 5 : 0;
}
