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
};

int main() {
    const int32_t takes[2] = {modelpress_takes_bf16(), modelpress_takes_quads()};
    std::fwrite(takes, sizeof takes, 1, stdout);
    std::fflush(stdout);
    int64_t n[9];
    while (read(n, sizeof n)) {
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
            modelpress_quads_matmul(static_cast<const int8_t*>(x.at),
                                    static_cast<const float*>(tokens.at), work.data(), codes,
                                    scale.at, int(n[2]), zeros, y.data(), M, N, K, group, int(n[7]),
                                    int(n[8]), 1);
        }
        std::fwrite(y.data(), sizeof(float), y.size(), stdout);
        std::fflush(stdout);
    }
}
