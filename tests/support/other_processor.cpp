// Answers calls of the CPU kernels on standard input: numbers, then each array and its length.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <vector>

extern "C" {
int modelpress_takes_bf16();
int modelpress_takes_quads();
void modelpress_tiles_matmul(const void*, int, uint32_t*, const uint8_t*, const void*, int,
                             const uint8_t*, float*, long, long, long, long, int, int, int);
void modelpress_quads_matmul(const int8_t*, const float*, uint32_t*, const uint8_t*, const void*,
                             int, const uint8_t*, float*, long, long, long, long, int, int, int);
void modelpress_best_scale(const float*, const float*, const float*, const float*, int64_t*, long,
                           long, long, float, float, int, int);
void modelpress_round_in_order(float*, const float*, const float*, const float*, const float*, long,
                               long, long, int);
}

static bool read(void* to, size_t bytes) { return std::fread(to, 1, bytes, stdin) == bytes; }

// An array that lies as torch's do; null if it has no bytes.
struct Array {
    void* at = nullptr;
    Array() {
        int64_t bytes;
        if (!read(&bytes, sizeof bytes) || bytes == 0) return;
        at = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (!read(at, bytes)) std::exit(1);
    }
    ~Array() { std::free(at); }
    float* floats() const { return static_cast<float*>(at); }
};

static void answer(const void* from, size_t bytes) {
    std::fwrite(from, 1, bytes, stdout);
    std::fflush(stdout);
}

static void product(const int64_t* n) {
    const long M = n[3], N = n[4], K = n[5], group = n[6];
    Array x, packed, scale, zero;
    std::vector<float> y(M * N);
    std::vector<uint32_t> work(M * (2 * K + 8));
    const auto* codes = static_cast<const uint8_t*>(packed.at);
    const auto* zeros = static_cast<const uint8_t*>(zero.at);
    if (n[0] == 0) {
        modelpress_tiles_matmul(x.at, int(n[1]), work.data(), codes, scale.at, int(n[2]), zeros,
                                y.data(), M, N, K, group, int(n[7]), int(n[8]), 1);
    } else {
        Array tokens;
        modelpress_quads_matmul(static_cast<const int8_t*>(x.at), tokens.floats(), work.data(), codes,
                                scale.at, int(n[2]), zeros, y.data(), M, N, K, group, int(n[7]),
                                int(n[8]), 1);
    }
    answer(y.data(), y.size() * sizeof(float));
}

static void best_scale(const int64_t* n) {
    Array W, scale, zero, importance;
    std::vector<int64_t> best(n[2]);
    modelpress_best_scale(W.floats(), scale.floats(), zero.floats(), importance.floats(), best.data(),
                          n[1], n[2], n[3], float(n[4]), float(n[5]), int(n[6]), 1);
    answer(best.data(), best.size() * sizeof(int64_t));
}

static void round_in_order(const int64_t* n) {
    Array base, coupling, low, high, scale;
    modelpress_round_in_order(base.floats(), coupling.floats(), low.floats(), high.floats(),
                              scale.floats(), n[1], n[2], n[3], 1);
    answer(base.at, n[1] * n[2] * sizeof(float));
}

int main() {
    const int32_t takes[2] = {modelpress_takes_bf16(), modelpress_takes_quads()};
    answer(takes, sizeof takes);
    int64_t n[9];
    while (read(n, sizeof n)) n[0] < 2 ? product(n) : n[0] == 2 ? best_scale(n) : round_in_order(n);
}
