// What every layer does around its products: inputs in the products' order, tasks for the threads.
#pragma once

#include "vec.h"

#include <algorithm>
#include <atomic>
#include <new>

constexpr int CHUNK = 48;  // tokens that are computed together

template <class T>
struct Scratch {
  explicit Scratch(int64_t count)
      : memory(static_cast<T*>(::operator new(count * sizeof(T) + 64, std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(memory, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* memory;
};

// The length of a packed row of a product's inputs: whole lines, and filled up so that rows start
// everywhere in a page. The sets of L1 are chosen by an address in its page, and a tile reads the same
// part of several rows at a time: with whole pages these would drive each other out.
template <class Product>
static int64_t packed_row(int64_t length) {
  constexpr int64_t PAGE = 2048, STEP = 832;  // bytes; 13 lines, so that 32 rows start in 32 places
  int64_t lines = (length + Product::LENGTH - 1) / Product::LENGTH;
  int64_t bytes = lines * Product::UNITS * int64_t(sizeof(typename Product::Input));
  int64_t pages = std::max<int64_t>(0, (bytes - STEP + PAGE - 1) / PAGE);
  return (pages * PAGE + STEP) / int64_t(sizeof(typename Product::Input));
}

// Copy one row of inputs into a product's order, padded with zeros.
template <class Product, class Model>
static void pack_row(const Model* row, int64_t length, typename Product::Input* packed) {
  constexpr int line_length = Product::LENGTH;
  for (int64_t k = 0; k < length; k += line_length) {
    alignas(64) float line[line_length] = {};
    for (int64_t i = k; i < length && i < k + line_length; ++i) line[i - k] = widen1(row[i]);
    Product::pack(line, packed + k / line_length * Product::UNITS);
  }
}

// Hand out `tasks` numbers to the threads that ask, each thread knowing its next one in advance. `now` is
// what this thread has asked for already.
template <class Task>
static void share(std::atomic<int64_t>& counter, int64_t tasks, int64_t now, Task task) {
  while (now < tasks) {
    int64_t next = counter++;
    task(now, next < tasks ? next : now);
    now = next;
  }
}
