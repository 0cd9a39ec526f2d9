/*
memory.cuh: host and device memory of the programs that test and measure the CUDA code.

What it is:  Floats on the host; Dev and Acts, device memory that frees itself and comes back as a vector.
Read before: bitnet/ops.h. Included behind train_bitnet.cu.
Defines:     Floats, Dev, Acts.
*/
#ifndef CUDA_MEMORY_CUH
#define CUDA_MEMORY_CUH

#include <vector>

typedef std::vector<float> Floats;

// Device memory of n values that frees itself.
template <class T>
struct Dev {
  T *p;
  size_t n;
  explicit Dev(size_t n_) : p((T *)dev_malloc(n_ * sizeof(T))), n(n_) {
    if (p == NULL) die(EXIT_FAILED, "out of memory: %zu bytes", n_ * sizeof(T));
  }
  explicit Dev(const std::vector<T> &v) : Dev(v.size()) { dev_copy_in(p, v.data(), n * sizeof(T)); }
  Dev(const Dev &) = delete;
  ~Dev() { dev_free(p); }
  std::vector<T> out() const {
    std::vector<T> v(n);
    dev_copy_out(v.data(), p, n * sizeof(T));
    return v;
  }
};

// The same for activations, which the host sees as floats.
struct Acts : Dev<floatX> {
  explicit Acts(size_t n_) : Dev<floatX>(n_) {}
  explicit Acts(const Floats &v) : Dev<floatX>(v.size()) { dev_floatx_in(p, v.data(), n); }
  Floats out() const {
    Floats v(n);
    dev_floatx_out(v.data(), p, n);
    return v;
  }
  bool same_bits(const Acts &o) const {
    std::vector<char> a(n * sizeof(floatX)), b(o.n * sizeof(floatX));
    dev_copy_out(a.data(), p, a.size());
    dev_copy_out(b.data(), o.p, b.size());
    return a == b;
  }
};

#endif
