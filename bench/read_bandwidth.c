// A plain read of memory with 64-byte vectors: nothing but loads and adds that hide behind them. Four places at once,
// kApart bytes from one to the next: some processors fetch ahead within a page alone, and then one place is not enough.
// hardware.py compiles this with -O3 -march=native and calls it from one thread a core.
#include <stddef.h>
#include <stdint.h>

typedef uint64_t vector __attribute__((vector_size(64)));

enum { kApart = 32 << 10, kVectors = kApart / sizeof(vector) };

// num_bytes are read in pieces of four times kApart; what is left at the end is not.
uint64_t read_all(const vector *data, size_t num_bytes) {
  vector a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t piece = 0; piece + 4 * kApart <= num_bytes; piece += 4 * kApart, data += 4 * kVectors) {
    for (size_t i = 0; i < kVectors; ++i) {
      a += data[i];
      b += data[i + kVectors];
      c += data[i + 2 * kVectors];
      d += data[i + 3 * kVectors];
    }
  }
  a += b + c + d;
  uint64_t sum = 0;
  for (int lane = 0; lane < 8; ++lane) sum += a[lane];
  return sum;
}
