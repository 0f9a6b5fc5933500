#define FASTGAN_ISA plain
#include "cpu/convolution.h"

#include <algorithm>

#include "cpu/operators.h"
#include "cpu/scratch.h"
#include "cpu/tensors.h"

namespace fastgan::cpu {
namespace {

using torch::headeronly::ScalarType;

const void* pointer(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

// How many sets of constants [4 * sets, C] a batch of N has, each for as many images.
int64_t sets_of(const char* op, const char* name, const Tensor& constants, int64_t N, int64_t C, ScalarType dtype) {
  int64_t sets = constants.dim() == 2 ? std::max<int64_t>(1, constants.size(0) / 4) : 1;
  check(op, name, constants, {4 * sets, C}, false, dtype);
  STD_TORCH_CHECK(N % sets == 0, op, ": ", sets, " sets of ", name, " must divide the batch, got ", N, " images");
  return sets;
}

// An operand's three tensors: a [N, C, H, W], with constants [4 * sets, C], or with b like a and constants.
OperandView view(const char* op, const Tensor& a, const std::optional<Tensor>& b, const std::optional<Tensor>& constants,
                 double slope) {
  ScalarType dtype = a.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double || dtype == ScalarType::BFloat16, op,
                  ": input must be float32, float64 or bfloat16");
  check(op, "input", a, shape_of(a), true, dtype);
  STD_TORCH_CHECK(!b || constants, op, ": a second operand needs constants");
  if (b) check(op, "second operand", *b, shape_of(a), true, dtype);
  int64_t sets = constants ? sets_of(op, "constants", *constants, a.size(0), a.size(1), stat_type(a)) : 1;
  return {a.const_data_ptr(), pointer(b), pointer(constants), slope, a.size(0) / sets};
}

// Whether AMX, where there is any, computes it: in bf16, which it multiplies, always. In fp32 it must pay to take 32 channels at
// a time, and for sums of pixels 16 of the large side.
bool use_tiles(const Convolution& c, bool bf16) {
  return c.scheme == scheme_automatic && (bf16 || c.C > (c.direction == Direction::to_weight ? 16 : thin_channels));
}

void run(const Convolution& c, ScalarType dtype) {
  if (c.N == 0) return;
  bool bf16 = dtype == ScalarType::BFloat16, fp64 = dtype == ScalarType::Double;
  FASTGAN_IF_AMX(if (isa() == Isa::amx && !fp64 && use_tiles(c, bf16)) {
    return bf16 ? amx::run_convolution_bf16(c) : amx::run_convolution(c);
  })
  FASTGAN_IF_AVX512(if (isa() >= Isa::avx512 && !fp64) return bf16 ? avx512::run_convolution_bf16(c) : avx512::run_convolution(c);)
  FASTGAN_IF_AVX2(if (isa() != Isa::plain) {
    return fp64 ? avx2::run_convolution_fp64(c) : bf16 ? avx2::run_convolution_bf16(c) : avx2::run_convolution(c);
  })
  STD_TORCH_CHECK(false, "fastgan's convolutions need AVX2, which this processor, build or FASTGAN_CPU lacks; use PyTorch's");
}

// A result that lasts until the next but one of this thread: what each block of a backward pass hands to the one before it. Fresh
// memory for it would cost a page fault per 4 KB.
Tensor make_passing(const Shape& shape, ScalarType dtype, const Tensor& input) {
  using plain::Scratch, plain::scratch;
  int64_t size = (shape[0] * shape[1] * shape[2] * shape[3] + 1) * 8;
  // As it is: grown, it would be another memory, and the input would be gone.
  bool even = scratch<char>(Scratch::even, 0) != input.const_data_ptr();
  char* memory = scratch<char>(even ? Scratch::even : Scratch::odd, size);
  return make_view(memory, shape, channels_last_strides(shape), dtype);
}

void check_channels(const char* op, int64_t large, int64_t small) {
  STD_TORCH_CHECK(large >= 1 && small >= 1, op, ": expected at least one channel on either side, got ", large, " and ", small);
}

void check_scheme(const char* op, int64_t scheme) {
  STD_TORCH_CHECK(scheme >= scheme_automatic && scheme <= scheme_direct, op, ": scheme must be 0, 1 or 2, got ", scheme);
}

void check_sides(const char* op, int64_t large, int64_t small) {
  STD_TORCH_CHECK(small >= 1 && large / 2 == small, op, ": the large side must be twice the small one or one more, got ",
                  large, " and ", small);
}

}  // namespace

std::tuple<Tensor, Tensor> convolve(Tensor input, std::optional<Tensor> second, std::optional<Tensor> constants, double slope,
                                    Tensor weight, bool to_large, int64_t height, int64_t width, int64_t statistics,
                                    std::optional<Tensor> output_y, std::optional<Tensor> output_constants,
                                    double output_slope, int64_t scheme, bool passing) {
  const char* op = "convolve";
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, op, ": input and weight must have 4 dimensions");
  check_channels(op, weight.size(1), weight.size(0));
  check_scheme(op, scheme);
  ScalarType dtype = input.scalar_type();
  int64_t N = input.size(0), K = weight.size(0), C = weight.size(1), from = to_large ? K : C, to = to_large ? C : K;
  OperandView operand = view(op, input, second, constants, slope);
  check(op, "input", input, {N, from, input.size(2), input.size(3)}, true, dtype);
  bool weight_channels_last = !weight.is_contiguous();
  check(op, "weight", weight, {K, C, 4, 4}, weight_channels_last, stat_type(input));
  check_sides(op, to_large ? height : input.size(2), to_large ? input.size(2) : height);
  check_sides(op, to_large ? width : input.size(3), to_large ? input.size(3) : width);
  STD_TORCH_CHECK(!output_y == !output_constants, op, ": output_y and output_constants come together");
  STD_TORCH_CHECK(!(statistics && output_y), op, ": statistics and output_y exclude each other");
  Shape shape{N, to, height, width};
  Tensor out = passing ? make_passing(shape, dtype, input) : make_channels_last(shape, dtype);
  STD_TORCH_CHECK(statistics >= 0 && (statistics == 0 || N % statistics == 0), op, ": statistics are of equal parts of the batch, got ",
                  statistics, " parts of ", N, " images");
  int64_t sets = output_y ? sets_of(op, "output_constants", *output_constants, N, to, stat_type(input)) : statistics;
  Tensor sums = make_zeros({2 * sets, to}, stat_type(input));
  ResultView result{out.mutable_data_ptr(), sums.numel() ? sums.mutable_data_ptr() : nullptr};
  if (output_y) {
    check(op, "output_y", *output_y, {N, to, height, width}, true, dtype);
    result.y = output_y->const_data_ptr(), result.constants = output_constants->const_data_ptr();
    result.slope = output_slope;
  }
  if (sets) result.images_per_set = N / sets;
  Convolution c{to_large ? Direction::to_large : Direction::to_small,
                N, C, to_large ? height : input.size(2), to_large ? width : input.size(3),
                K, to_large ? input.size(2) : height, to_large ? input.size(3) : width, scheme};
  c.weight = weight.const_data_ptr(), c.weight_channels_last = weight_channels_last, c.result = result;
  (to_large ? c.small : c.large) = operand;
  run(c, dtype);
  return {out, sums};
}

Tensor weight_gradient(Tensor large, std::optional<Tensor> large_second, std::optional<Tensor> large_constants,
                       double large_slope, Tensor small, std::optional<Tensor> small_second,
                       std::optional<Tensor> small_constants, double small_slope, bool channels_last,
                       int64_t scheme) {
  const char* op = "weight_gradient";
  STD_TORCH_CHECK(large.dim() == 4 && small.dim() == 4, op, ": both sides must have 4 dimensions");
  check_channels(op, large.size(1), small.size(1));
  check_scheme(op, scheme);
  Convolution c{Direction::to_weight, large.size(0), large.size(1), large.size(2), large.size(3),
                small.size(1), small.size(2), small.size(3), scheme};
  c.large = view(op, large, large_second, large_constants, large_slope);
  c.small = view(op, small, small_second, small_constants, small_slope);
  check(op, "small side", small, {c.N, c.K, c.H, c.W}, true, large.scalar_type());
  check_sides(op, c.LH, c.H);
  check_sides(op, c.LW, c.W);
  Shape shape{c.K, c.C, 4, 4};
  ScalarType dtype = large.scalar_type();
  Tensor out = channels_last ? make_channels_last(shape, stat_type(large)) : make_empty(shape, stat_type(large));
  if (c.N == 0) torch::stable::zero_(out);
  c.result.out = out.mutable_data_ptr(), c.weight_channels_last = channels_last;
  run(c, dtype);
  return out;
}

}  // namespace fastgan::cpu
