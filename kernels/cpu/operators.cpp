// The products of tiles.cpp and quads.cpp as operators of torch; native.py compiles all three into one
// library where torch's headers are.
//
// Torch calls them as its own, eagerly and in what torch.compile makes, without Python in between,
// which takes as long as a small product. Only torch's stable interface is used.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "vectors.h"

extern "C" int modelpress_takes_bf16();
extern "C" int modelpress_takes_quads();
extern "C" void modelpress_tiles_matmul(const void* x, int x_kind, uint32_t* work,
                                        const uint8_t* packed, const void* scale, int scale_kind,
                                        const uint8_t* zero, float* y, long M, long N, long K,
                                        long group, int bits, int middle, int threads);
extern "C" void modelpress_quads_matmul(const int8_t* x, const float* token_scale, uint32_t* work,
                                        const uint8_t* packed, const void* scale, int scale_kind,
                                        const uint8_t* zero, float* y, long M, long N, long K,
                                        long group, int bits, int middle, int threads);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Maybe = std::optional<Tensor>;

// What lies behind an address cannot be checked later.
void require(bool holds, const char* what) {
    STD_TORCH_CHECK(holds, "compiled kernels expected ", what, ", found another tensor");
}

int kind(const Tensor& t) {
    const ScalarType type = t.scalar_type();
    require(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
            "fp16, bf16 or fp32");
    return type == ScalarType::Float ? FP32 : type == ScalarType::BFloat16 ? BF16 : FP16;
}

bool shaped(const Tensor& t, int64_t rows, int64_t columns) {
    return t.dim() == 2 && t.size(0) == rows && t.size(1) == columns && t.is_contiguous();
}

const uint8_t* bytes(const Tensor& t) { return static_cast<const uint8_t*>(t.data_ptr()); }

Tensor empty(const Tensor& like, int64_t rows, int64_t columns, ScalarType type) {
    return torch::stable::new_empty(like, {rows, columns}, type);
}

// A packed weight [N, K], as its product takes it. line: bytes of a step of `step` inputs.
Weight checked(const Tensor& packed, const Tensor& scale, const Maybe& zero, int64_t K, int64_t group,
               int64_t step, int64_t line, int middle) {
    require(K > 0 && group >= 0 && group % step == 0, "groups of whole steps of inputs");
    if (group == 0) group = K;
    require(scale.dim() == 2 && scale.is_contiguous(), "a scale for each group");
    const int64_t N = scale.size(1), groups = (K + group - 1) / group;
    require(scale.size(0) == groups, "a scale for each group");
    require(packed.scalar_type() == ScalarType::Byte && packed.is_contiguous() && packed.dim() == 3 &&
                packed.size(0) == (N + WIDE - 1) / WIDE && packed.size(1) == (K + step - 1) / step &&
                packed.size(2) == line,
            "packed codes");
    require(!zero || (zero->scalar_type() == ScalarType::Byte && shaped(*zero, groups, N)),
            "zero points like scales");
    return {bytes(packed), scale.data_ptr(), kind(scale), zero ? bytes(*zero) : nullptr,
            N,             K,                group,       middle};
}

template <int KIND>
void add(const void* bias, float* y, int64_t M, int64_t N) {
    for (int64_t m = 0; m < M; m++)
        for (int64_t n = 0; n < N; n++) y[m * N + n] += number<KIND>(bias, n);
}

// y plus the bias, rounded to `type` once.
Tensor finished(Tensor y, const Maybe& bias, ScalarType type) {
    if (bias) {
        const int64_t M = y.size(0), N = y.size(1);
        require(bias->dim() == 1 && bias->size(0) == N && bias->is_contiguous(), "a bias");
        float* to = static_cast<float*>(y.data_ptr());
        const void* from = bias->data_ptr();
        const int of = kind(*bias);
        of == FP32   ? add<FP32>(from, to, M, N)
        : of == BF16 ? add<BF16>(from, to, M, N)
                     : add<FP16>(from, to, M, N);
    }
    return type == ScalarType::Float ? y : torch::stable::to(y, type);
}

int64_t middle(int64_t bits) { return int64_t(1) << (bits - 1); }

Tensor tiles_matmul(Tensor x, Tensor packed, Tensor scale, Maybe zero, Maybe bias, int64_t bits,
                    int64_t group) {
    require(bits == 2 || bits == 3 || bits == 4 || bits == 8, "codes of 2, 3, 4 or 8 bits");
    require(x.dim() == 2, "rows of activations");
    const ScalarType type = x.scalar_type();
    const int64_t M = x.size(0), K = x.size(1);
    const Weight w = checked(packed, scale, zero, K, group, 2, FIELD * bits, int(middle(bits)));
    if (kind(x) == FP16 || (kind(x) == BF16 && !modelpress_takes_bf16()))
        x = torch::stable::to(x, ScalarType::Float);
    x = torch::stable::contiguous(x);
    Tensor work = empty(x, M, (K + 1) / 2 * (kind(x) == BF16 ? 1 : 2), ScalarType::Int);
    Tensor y = empty(x, M, w.N, ScalarType::Float);
    modelpress_tiles_matmul(x.data_ptr(), kind(x), static_cast<uint32_t*>(work.data_ptr()), w.packed,
                            w.scale, w.scale_kind, w.zero, static_cast<float*>(y.data_ptr()), M, w.N, K,
                            w.group, int(bits), w.middle, int(torch::stable::get_num_threads()));
    return finished(y, bias, type);
}

// stored: bits that a code lies in
Tensor quads_matmul(Tensor values, Tensor token_scale, Tensor packed, Tensor scale, Maybe zero,
                    Maybe bias, int64_t bits, int64_t stored, int64_t group, ScalarType type) {
    require(modelpress_takes_quads(), "a processor that multiplies bytes");
    require(stored == 2 || stored == 4 || stored == 8, "codes in 2, 4 or 8 bits");
    require(values.scalar_type() == ScalarType::Char && values.dim() == 2 && values.is_contiguous(),
            "rows of int8");
    const int64_t M = values.size(0), K = values.size(1);
    require(token_scale.scalar_type() == ScalarType::Float && token_scale.dim() == 1 &&
                token_scale.size(0) == M && token_scale.is_contiguous(),
            "a scale for each token");
    const Weight w = checked(packed, scale, zero, K, group, 4, 2 * FIELD * stored, int(middle(bits)));
    Tensor work = empty(values, M, (K + 3) / 4 + (K + w.group - 1) / w.group, ScalarType::Int);
    Tensor y = empty(values, M, w.N, ScalarType::Float);
    modelpress_quads_matmul(static_cast<const int8_t*>(values.data_ptr()),
                            static_cast<const float*>(token_scale.data_ptr()),
                            static_cast<uint32_t*>(work.data_ptr()), w.packed, w.scale, w.scale_kind,
                            w.zero, static_cast<float*>(y.data_ptr()), M, w.N, K, w.group, int(stored),
                            w.middle, int(torch::stable::get_num_threads()));
    return finished(y, bias, type);
}

void define(torch::stable::detail::StableLibrary& library) {
    library.def(
        "tiles_matmul(Tensor x, Tensor packed, Tensor scale, Tensor? zero, Tensor? bias, int bits, "
        "int group_size) -> Tensor");
    library.def(
        "quads_matmul(Tensor values, Tensor token_scale, Tensor packed, Tensor scale, Tensor? zero, "
        "Tensor? bias, int bits, int stored, int group_size, ScalarType dtype) -> Tensor");
}

void implement(torch::stable::detail::StableLibrary& library) {
    library.impl("tiles_matmul", TORCH_BOX(&tiles_matmul));
    library.impl("quads_matmul", TORCH_BOX(&quads_matmul));
}

}  // namespace

// Makes the operators known to torch until the process ends, once a namespace. Not as the library is
// loaded: two copies of it in a process would be an error there, and end the process.
extern "C" void modelpress_register(const char* name) {
    using torch::stable::detail::StableLibrary;
    using Registration = torch::stable::detail::StableTorchLibraryInit;
    new Registration(StableLibrary::Kind::DEF, define, name, nullptr, __FILE__, __LINE__);
    new Registration(StableLibrary::Kind::IMPL, implement, name, "CPU", __FILE__, __LINE__);
}
