// Gradient statistics and checksums of CPU tensors, each in one read of memory. Of the statistics `reference.py` is
// the specification.
//
// Squares are summed in LANES lanes of fp32 over a chunk, lanes and chunks in float64 in a fixed order: the same
// gradients give the same bits on every number of threads and on every instruction set. A chunk with a NaN or
// an Inf, or whose sum overflowed or is so small that squares may have been lost, is measured again in float64.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

constexpr int LANES = 8;
constexpr int64_t CHUNK = 2048;       // elements that are summed in fp32
constexpr int64_t TASK = 32 * CHUNK;  // elements that a thread takes at once
constexpr double LEAST_SUM = 0x1p-83; // below it a square under 2^-126 may be missing
constexpr int32_t INFINITY_BITS = 0x7f800000, MAGNITUDE = 0x7fffffff;

// Vectors that GCC and Clang map to what the machine has.
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));

struct Row {
  double sum_squares = 0;
  int32_t max_bits = 0;  // of a magnitude: the bits of non-negative floats are ordered as they are
  int64_t num_nan = 0, num_inf = 0, num_zero = 0;

  void add(const Row& other) {
    sum_squares += other.sum_squares;
    max_bits = max_bits > other.max_bits ? max_bits : other.max_bits;
    num_nan += other.num_nan, num_inf += other.num_inf, num_zero += other.num_zero;
  }
};

template <typename To, typename From>
inline To cast_bits(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <typename Vector, typename Element>
inline Vector load(const Element* at) {
  Vector vector;
  std::memcpy(&vector, at, sizeof vector);
  return vector;
}

// The bits of elements, widened to fp32.
inline Ints bits_of_lanes(const float* at) { return load<Ints>(at); }
inline Ints bits_of_lanes(const uint16_t* at) { return __builtin_convertvector(load<Halves>(at), Ints) << 16; }
inline int32_t bits_of(float value) { return cast_bits<int32_t>(value); }
inline int32_t bits_of(uint16_t bfloat16) { return int32_t(uint32_t(bfloat16) << 16); }

// Nothing is assumed about the elements.
template <typename Element>
Row measure_exactly(const Element* elements, int64_t count) {
  Row row;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t magnitude = bits_of(elements[i]) & MAGNITUDE;
    row.num_nan += magnitude > INFINITY_BITS, row.num_inf += magnitude == INFINITY_BITS;
    row.num_zero += magnitude == 0;
    const int32_t finite = magnitude < INFINITY_BITS ? magnitude : 0;
    row.max_bits = row.max_bits > finite ? row.max_bits : finite;
    row.sum_squares += double(cast_bits<float>(finite)) * double(cast_bits<float>(finite));
  }
  return row;
}

template <typename Element>
Row measure_chunk(const Element* elements, int64_t count) {
  Floats sums = {};
  Ints largest = {}, zeros = {};
  for (int64_t i = 0; i < count; i += LANES) {
    const Ints magnitude = bits_of_lanes(elements + i) & MAGNITUDE;
    const Floats value = cast_bits<Floats>(magnitude);
    sums += value * value;
    largest = magnitude > largest ? magnitude : largest;
    zeros -= magnitude == 0;  // a comparison gives -1
  }
  Row row;
  for (int lane = 0; lane < LANES; ++lane) row.add({double(sums[lane]), largest[lane], 0, 0, zeros[lane]});
  const bool is_sound = row.max_bits < INFINITY_BITS && (row.sum_squares >= LEAST_SUM || row.max_bits == 0) &&
                        row.sum_squares <= 0x1p+127;  // neither NaN nor overflow in any lane
  return is_sound ? row : measure_exactly(elements, count);
}

template <typename Element>
Row measure(const Element* elements, int64_t count) {
  Row row;
  const int64_t whole = count - count % LANES;
  for (int64_t start = 0; start < whole; start += CHUNK)
    row.add(measure_chunk(elements + start, whole - start < CHUNK ? whole - start : CHUNK));
  row.add(measure_exactly(elements + whole, count - whole));
  return row;
}

template <typename Integer>
uint64_t sum_integers(const Integer* values, int64_t count, int num_threads) {
  uint64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total) num_threads(num_threads) \
    if (num_threads > 1 && count > TASK)
  for (int64_t start = 0; start < count; start += TASK) {
    const int64_t end = count - start < TASK ? count : start + TASK;
    int64_t sum = 0;  // of at most 2^16 values: only 64-bit ones wrap around, and those have to
    for (int64_t i = start; i < end; ++i) sum = int64_t(uint64_t(sum) + uint64_t(int64_t(values[i])));
    total += uint64_t(sum);
  }
  return total;
}

}  // namespace

// The sum of elements of 1 (unsigned), 2, 4 or 8 bytes as integers, modulo 2^64.
extern "C" int64_t harness_sum_of_bits(const void* values, int64_t count, int64_t bytes, int num_threads) {
  switch (bytes) {
    case 1: return int64_t(sum_integers(static_cast<const uint8_t*>(values), count, num_threads));
    case 2: return int64_t(sum_integers(static_cast<const int16_t*>(values), count, num_threads));
    case 4: return int64_t(sum_integers(static_cast<const int32_t*>(values), count, num_threads));
    default: return int64_t(sum_integers(static_cast<const int64_t*>(values), count, num_threads));
  }
}

// tensors: their first elements; is_bfloat16: else float32; rows: [num_tensors, 5], columns as in layout.py.
extern "C" void harness_statistics(const void* const* tensors, const int64_t* sizes,
                                   const uint8_t* is_bfloat16, int64_t num_tensors, int num_threads,
                                   double* rows) {
  const auto first_task = std::make_unique<int64_t[]>(num_tensors + 1);
  for (int64_t i = 0; i < num_tensors; ++i) first_task[i + 1] = first_task[i] + (sizes[i] + TASK - 1) / TASK;
  const int64_t num_tasks = first_task[num_tensors];
  const auto partial = std::make_unique<Row[]>(num_tasks);
#pragma omp parallel for schedule(static) num_threads(num_threads) if (num_threads > 1 && num_tasks > 1)
  for (int64_t task = 0; task < num_tasks; ++task) {
    int64_t low = 0, high = num_tensors;  // the last tensor that begins at this task or before
    while (high - low > 1) {
      const int64_t middle = (low + high) / 2;
      (first_task[middle] <= task ? low : high) = middle;
    }
    const int64_t start = (task - first_task[low]) * TASK;
    const int64_t count = sizes[low] - start < TASK ? sizes[low] - start : TASK;
    partial[task] = is_bfloat16[low] ? measure(static_cast<const uint16_t*>(tensors[low]) + start, count)
                                     : measure(static_cast<const float*>(tensors[low]) + start, count);
  }
  for (int64_t i = 0; i < num_tensors; ++i) {
    Row row;
    for (int64_t task = first_task[i]; task < first_task[i + 1]; ++task) row.add(partial[task]);
    double* const columns = rows + 5 * i;
    columns[0] = row.sum_squares, columns[1] = cast_bits<float>(row.max_bits);
    columns[2] = double(row.num_nan), columns[3] = double(row.num_inf), columns[4] = double(row.num_zero);
  }
}
