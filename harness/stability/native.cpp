// Gradient statistics and checksums of CPU tensors, each in one read of memory. Of the statistics `reference.py` is
// the specification.
//
// Squares are summed in BLOCK lanes of fp32 over a chunk, lanes and chunks in float64 in a fixed order: the same
// gradients give the same bits on every number of threads and on every instruction set. A chunk with a NaN or
// an Inf, or whose sum overflowed or is so small that squares may have been lost, is measured again in float64.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>

namespace {

constexpr int LANES = 8;              // fp32 elements of a vector
constexpr int VECTORS = 4;            // so many sums at once: an addition's result is there some cycles later
constexpr int BLOCK = VECTORS * LANES;
constexpr int64_t CHUNK = 64 * BLOCK; // elements that are summed in fp32
constexpr int64_t TASK = 32 * CHUNK;  // elements that a thread takes at once
constexpr int64_t CACHE_LINE = 64, AHEAD = 4096;  // bytes
constexpr double LEAST_SUM = 0x1p-83; // below it a square under 2^-126 may be missing
constexpr int32_t INFINITY_BITS = 0x7f800000, MAGNITUDE = 0x7fffffff;
constexpr int16_t MAGNITUDE_16 = 0x7fff;  // of a bfloat16, which is the upper half of a float
constexpr int32_t UPPER_HALF = 0x7fff0000;

// Vectors that GCC and Clang map to what the machine has.
typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef int16_t Shorts __attribute__((vector_size(4 * LANES)));

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

// What will be read AHEAD bytes later is asked for now: the processor's own prefetching ends with a page of memory.
inline void prefetch(const void* at, int64_t num_bytes) {
  for (int64_t line = 0; line < num_bytes; line += CACHE_LINE)
    __builtin_prefetch(static_cast<const char*>(at) + AHEAD + line);
}

// The bits of an element, widened to fp32.
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

// Sums over whole blocks, in `squares` lane by lane. Comparisons give -1 where they hold.
struct FloatSums {
  Floats squares[VECTORS] = {};
  Ints largest = {}, zeros = {};

  void add_block(const float* at) {
    for (int i = 0; i < VECTORS; ++i) {
      const Ints magnitude = load<Ints>(at + i * LANES) & MAGNITUDE;
      const Floats value = cast_bits<Floats>(magnitude);
      squares[i] += value * value;
      largest = magnitude > largest ? magnitude : largest;
      zeros -= magnitude == 0;
    }
  }
  int32_t largest_of(int lane) const { return largest[lane]; }
};

// Of bfloat16, counted and compared where they lie, two to a lane of 32 bits: the lower one is shifted up to be a
// float, the upper one is a float once the lower one is masked out.
struct BfloatSums {
  Floats squares[VECTORS] = {};
  Shorts largest = {}, zeros = {};  // at most CHUNK / (2 * LANES) a lane

  void add_block(const uint16_t* at) {
    for (int i = 0; i < VECTORS; i += 2) {
      const Shorts magnitude = load<Shorts>(at + i * LANES) & MAGNITUDE_16;
      const Ints pairs = cast_bits<Ints>(magnitude);
      const Floats lower = cast_bits<Floats>(pairs << 16), upper = cast_bits<Floats>(pairs & UPPER_HALF);
      squares[i] += lower * lower;
      squares[i + 1] += upper * upper;
      largest = magnitude > largest ? magnitude : largest;
      zeros -= magnitude == 0;
    }
  }
  int32_t largest_of(int lane) const { return int32_t(largest[lane]) << 16; }
};

inline FloatSums no_sums(const float*) { return {}; }
inline BfloatSums no_sums(const uint16_t*) { return {}; }

template <typename Element>
Row measure_chunk(const Element* elements, int64_t count) {
  auto sums = no_sums(elements);
  for (int64_t i = 0; i < count; i += BLOCK) {
    prefetch(elements + i, BLOCK * sizeof(Element));
    sums.add_block(elements + i);
  }
  Row row;
  const Floats squares = (sums.squares[0] + sums.squares[1]) + (sums.squares[2] + sums.squares[3]);
  for (int lane = 0; lane < LANES; ++lane) row.sum_squares += double(squares[lane]);
  constexpr int NARROW = sizeof(sums.zeros) / sizeof(sums.zeros[0]);
  for (int lane = 0; lane < NARROW; ++lane) row.add({0, sums.largest_of(lane), 0, 0, sums.zeros[lane]});
  const bool is_sound = row.max_bits < INFINITY_BITS && (row.sum_squares >= LEAST_SUM || row.max_bits == 0) &&
                        row.sum_squares <= 0x1p+127;  // neither NaN nor overflow in any lane
  return is_sound ? row : measure_exactly(elements, count);
}

template <typename Element>
Row measure(const Element* elements, int64_t count) {
  Row row;
  const int64_t whole = count - count % BLOCK;
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
