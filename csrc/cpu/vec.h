// Vectors of the width of the instruction set compiled for, and conversions between them and storage. Everything has
// internal linkage, since this header is compiled once for each instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kVecBytes = 64;
#elif defined(__AVX2__)
constexpr int kVecBytes = 32;
#else
constexpr int kVecBytes = 16;
#endif

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

template <class A>
struct VecOf {
    typedef A type __attribute__((vector_size(kVecBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;
template <class A>
constexpr int kLanes = kVecBytes / int(sizeof(A));

typedef uint32_t VecU32 __attribute__((vector_size(kVecBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVecBytes / 2)));

template <class To, class From>
inline To bits_as(const From& from) {
    static_assert(sizeof(To) == sizeof(From), "a cast of bits keeps the size");
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

// Rounds to nearest even; a NaN stays a NaN. U is uint32_t or a vector of it.
template <class U>
inline U bf16_bits(U f32) {
    U rounded = (f32 + 0x7fffu + ((f32 >> 16) & 1u)) >> 16;
    return (f32 & 0x7fffffffu) > 0x7f800000u ? ((f32 >> 16) | 0x40u) : rounded;
}

inline float f16_to_float(uint16_t half) {
    uint32_t sign = uint32_t(half & 0x8000u) << 16, magnitude = half & 0x7fffu;
    if (magnitude >= 0x7c00u) return bits_as<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
    // Scaling by 2^112 turns the exponent's bias from 15 into 127, of subnormals too.
    float value = bits_as<float>(magnitude << 13) * bits_as<float>(uint32_t(127 + 112) << 23);
    return bits_as<float>(sign | bits_as<uint32_t>(value));
}

inline uint16_t float_to_f16(float value) {
    uint32_t bits = bits_as<uint32_t>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00u);  // rounds to 65520 or more
    if (magnitude < 0x38800000u)  // subnormal: adding 0.5 makes the float unit round at 2^-24
        return uint16_t(sign | (bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u));
    return uint16_t(sign | (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13);
}

// Conversions for load<V> and store, where V is an accumulator A or Vec<A>. Storage of type A itself is not converted.
template <class V, class T>
struct Convert;

template <class V>
struct Identity {
    template <class T>
    static V load(const T* p) {
        V v;
        memcpy(&v, p, sizeof v);
        return v;
    }
    static V bits(V v) { return v; }
};
template <>
struct Convert<float, float> : Identity<float> {};
template <>
struct Convert<double, double> : Identity<double> {};
template <>
struct Convert<Vec<float>, float> : Identity<Vec<float>> {};
template <>
struct Convert<Vec<double>, double> : Identity<Vec<double>> {};

template <>
struct Convert<float, bf16> {
    static float load(const bf16* p) { return bits_as<float>(uint32_t(p->bits) << 16); }
    static uint16_t bits(float v) { return uint16_t(bf16_bits(bits_as<uint32_t>(v))); }
};
template <>
struct Convert<Vec<float>, bf16> {
    static Vec<float> load(const bf16* p) {
        VecU16 half;
        memcpy(&half, p, sizeof half);
        return bits_as<Vec<float>>(__builtin_convertvector(half, VecU32) << 16);
    }
    static VecU16 bits(Vec<float> v) { return __builtin_convertvector(bf16_bits(bits_as<VecU32>(v)), VecU16); }
};

template <>
struct Convert<float, f16> {
    static float load(const f16* p) { return f16_to_float(p->bits); }
    static uint16_t bits(float v) { return float_to_f16(v); }
};
template <>
struct Convert<Vec<float>, f16> {
    static Vec<float> load(const f16* p) {
#if defined(__AVX512F__)
        return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif defined(__F16C__)
        return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
        Vec<float> v;
        for (int i = 0; i < kLanes<float>; ++i) v[i] = f16_to_float(p[i].bits);
        return v;
#endif
    }
    static VecU16 bits(Vec<float> v) {
#if defined(__AVX512F__)
        return (VecU16)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
        return (VecU16)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
        VecU16 half;
        for (int i = 0; i < kLanes<float>; ++i) half[i] = float_to_f16(v[i]);
        return half;
#endif
    }
};

template <class V, class T>
inline V load(const T* p) {
    return Convert<V, T>::load(p);
}

template <class V, class T>
inline void store(T* p, V v) {
    auto bits = Convert<V, T>::bits(v);
    memcpy(p, &bits, sizeof bits);
}

// 2^z, to 2 ulp from 2^-126 on, which is the least; from 2^128 on infinite. A NaN stays a NaN.
template <class U, class V>
inline V power_of_two_f32(V z) {
    const V least = V{} - 126.0f, most = V{} + 128.0f;
    z = z < least ? least : z;
    z = z > most ? most : z;
    const V shifted = z + 12582912.0f;       // 1.5·2^23, so that the mantissa ends with the nearest whole number n
    const V f = z - (shifted - 12582912.0f);  // -0.5 to 0.5
    // The polynomial through the Chebyshev nodes; its relative error is 3e-9.
    V p = 1.54614449e-4f * f + 1.34004280e-3f;
    p = p * f + 9.61805694e-3f;
    p = p * f + 5.55032715e-2f;
    p = p * f + 2.40226507e-1f;
    p = p * f + 6.93147182e-1f;
    p = p * f + 1.0f;
    return bits_as<V>(bits_as<U>(p) + (bits_as<U>(shifted) << 23));  // n is added to the exponent
}
inline float power_of_two(float z) { return power_of_two_f32<uint32_t>(z); }
inline Vec<float> power_of_two(Vec<float> z) { return power_of_two_f32<VecU32>(z); }
inline double power_of_two(double z) { return __builtin_exp2(z); }
inline Vec<double> power_of_two(Vec<double> z) {
    for (int i = 0; i < kLanes<double>; ++i) z[i] = __builtin_exp2(z[i]);
    return z;
}

template <class V>
struct Lane {
    using type = V;
};

// Calls f(i, Lane<Vec<A>>) for whole vectors, then f(i, Lane<A>) for the rest of n.
template <class A, class F>
inline __attribute__((always_inline)) void sweep(int64_t n, F f) {
    int64_t i = 0;
    for (; i + kLanes<A> <= n; i += kLanes<A>) f(i, Lane<Vec<A>>{});
    for (; i < n; ++i) f(i, Lane<A>{});
}

// A sum over sweep's lanes.
template <class A>
struct Sum {
    Vec<A> vector = {};
    A scalar = 0;
    void add(Vec<A> v) { vector += v; }
    void add(A v) { scalar += v; }
    A total() const {
        A sum = scalar;
        for (int i = 0; i < kLanes<A>; ++i) sum += vector[i];
        return sum;
    }
};

}  // namespace
