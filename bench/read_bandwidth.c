// A plain read of memory with 64-byte vectors, four at a time: nothing but loads and adds that hide behind them.
// hardware.py compiles this with -O3 -march=native and calls it from one thread a core.
#include <stddef.h>
#include <stdint.h>

typedef uint64_t vector __attribute__((vector_size(64)));

uint64_t read_all(const vector *data, size_t num_bytes) {
  vector a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t i = 0; i + 4 <= num_bytes / sizeof(vector); i += 4) {
    a += data[i];
    b += data[i + 1];
    c += data[i + 2];
    d += data[i + 3];
  }
  a += b + c + d;
  uint64_t sum = 0;
  for (int lane = 0; lane < 8; ++lane) sum += a[lane];
  return sum;
}
