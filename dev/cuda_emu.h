/*
cuda_emu.h: just enough CUDA for g++ to compile train_bitnet.cu and to run its kernels on the CPU, at test sizes.

What it is:  a test tool for machines without a GPU. It is included in front of train_bitnet.cu (g++ -include dev/cuda_emu.h)
             and stands in for the CUDA headers, for cuBLASLt and for the few instructions that the .cu file wraps.
What not:    no performance, no asynchrony (everything on a stream happens at once, in order), no model of memory coalescing.
Read before: nothing; the CUDA programming guide tells what is imitated.
Defines:     threadIdx and friends, LAUNCH, SHARED_DYNAMIC, __syncthreads, warp shuffles and votes, mma_bf16, mma_i8,
             ldmatrix_x4, cp_async16, bf16, cudaMalloc & co, the used part of cuBLASLt as plain loops.

How it works. A block's threads are fibers: each has its own stack and runs until it must wait for others (a barrier, a shuffle),
then hands the CPU back to a scheduler that resumes the next one. What the tool is there to catch:
  a missing barrier      warps run one after the other, each as far ahead as barriers let it, in ascending or descending order
                         (environment EMU_ORDER=0 or 1), lanes and blocks likewise: code that depends on the order gives wrong results
  a divergent barrier    a thread that ends, or waits elsewhere, while others wait for it: reported as a deadlock
  out-of-bounds access   device memory and dynamic shared memory are exact-size mallocs, static shared memory are globals: ASan
  uninitialised memory   both kinds of malloc are filled with 0xFF, which is a NaN in float and in bf16
  a missing wait         an asynchronous copy happens when it is waited for, or (order 1) at once
  misaligned vectors     UBSan (vector types carry CUDA's alignments)
  wrong launches         too many threads, too large grids, shared memory above 48 KiB that was not asked for
*/
#ifndef CUDA_EMU_H
#define CUDA_EMU_H

#include <algorithm>
#include <functional>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <vector>
#if !defined(__x86_64__) || defined(EMU_UCONTEXT)
#define EMU_USE_UCONTEXT
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

#define __CUDACC__                                 // shared headers ask for it
#define __global__
#define __device__
#define __host__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static                          // blocks run one after the other, so one copy is enough
#define __align__(n) __attribute__((aligned(n)))
#define EMU_FN __attribute__((unused)) static

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct __align__(8) float2 {
  float x, y;
};
struct __align__(16) float4 {
  float x, y, z, w;
};
struct __align__(8) uint2 {
  unsigned x, y;
};
struct __align__(16) uint4 {
  unsigned x, y, z, w;
};

// ---------------------------------------------------------------------------------------------------------
// Fibers.

enum { EMU_READY, EMU_AT_BARRIER, EMU_AT_WARP, EMU_DONE };
enum { EMU_STACK = 64 << 10, EMU_SLOT = 64, EMU_MAX_THREADS = 1024, EMU_SHARED_DEFAULT = 48 << 10, EMU_SHARED_MOST = 163 << 10 };

struct EmuCopy {      // an asynchronous copy that has not happened yet
  void *dst;
  const void *src;
  int bytes, group;
};

struct EmuFiber {
#ifdef EMU_USE_UCONTEXT
  ucontext_t context;
#else
  void *sp;
#endif
  void *fake_stack;   // ASan's bookkeeping
  char *stack;
  uint3 index;
  int state, warp, lane;
  unsigned ticket;    // generation of the barrier or of the warp at which it waits
  int group;          // of cp.async
  std::vector<EmuCopy> copies;
};

struct EmuWarp {
  unsigned generation, mask;
  int arrived, lanes;
  unsigned char slot[2][32][EMU_SLOT];   // what each lane contributes; two, for a quick lane may be one collective ahead
};

static struct {
  EmuFiber fiber[EMU_MAX_THREADS];
  EmuWarp warp[EMU_MAX_THREADS / 32];
  EmuFiber scheduler, *current;
  int threads, arrived;
  unsigned generation;                   // of the block's barrier
  const void *body;
  void (*call)(const void *body);
  const char *kernel;
  unsigned char *shared;                 // dynamic shared memory
  const void *main_stack;
  size_t main_size;
} emu;

static uint3 threadIdx, blockIdx;
static dim3 blockDim, gridDim;

__attribute__((noreturn, unused)) static void emu_die(const char *what) {
  fprintf(stderr, "cuda_emu: %s: %s (block %u,%u,%u, thread %u)\n", emu.kernel ? emu.kernel : "host", what, blockIdx.x, blockIdx.y,
          blockIdx.z, threadIdx.x);
  abort();
}

// 0 = ascending, 1 = descending; tests may set it directly.
static int emu_order = getenv("EMU_ORDER") ? atoi(getenv("EMU_ORDER")) : 0;

#ifndef EMU_USE_UCONTEXT
// Saves the registers that a called function must keep, swaps stacks, restores the other side's registers and returns there.
extern "C" void emu_swap(void **save_sp, void *load_sp);
__asm__(
    ".text\n"
    "emu_swap:\n"
    "  pushq %rbp\n  pushq %rbx\n  pushq %r12\n  pushq %r13\n  pushq %r14\n  pushq %r15\n"
    "  movq %rsp, (%rdi)\n"
    "  movq %rsi, %rsp\n"
    "  popq %r15\n  popq %r14\n  popq %r13\n  popq %r12\n  popq %rbx\n  popq %rbp\n"
    "  ret\n");
#endif

// Goes from one fiber to another; the scheduler runs on the program's own stack.
EMU_FN void emu_switch(EmuFiber *from, EmuFiber *to) {
#ifdef __SANITIZE_ADDRESS__
  const void *bottom = to == &emu.scheduler ? emu.main_stack : to->stack;
  size_t size = to == &emu.scheduler ? emu.main_size : (size_t)EMU_STACK;
  __sanitizer_start_switch_fiber(from->state == EMU_DONE ? NULL : &from->fake_stack, bottom, size);
#endif
#ifdef EMU_USE_UCONTEXT
  swapcontext(&from->context, &to->context);
#else
  emu_swap(&from->sp, to->sp);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(from->fake_stack, from == &emu.scheduler ? NULL : &emu.main_stack, from == &emu.scheduler ? NULL
                                  : &emu.main_size);
#endif
}

EMU_FN void emu_fiber_main() {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(NULL, &emu.main_stack, &emu.main_size);
#endif
  emu.call(emu.body);
  if (emu.current->copies.size()) emu_die("a thread ended without waiting for its cp.async");
  emu.current->state = EMU_DONE;
  emu_switch(emu.current, &emu.scheduler);
  abort();
}

EMU_FN void emu_fiber_start(EmuFiber *f) {
  if (f->stack == NULL) {
    f->stack = (char *)mmap(NULL, EMU_STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (f->stack == MAP_FAILED) emu_die("no memory for stacks");
  }
#ifdef EMU_USE_UCONTEXT
  getcontext(&f->context);
  f->context.uc_stack.ss_sp = f->stack;
  f->context.uc_stack.ss_size = EMU_STACK;
  f->context.uc_link = NULL;
  makecontext(&f->context, emu_fiber_main, 0);
#else
  void **top = (void **)(f->stack + EMU_STACK) - 2;   // after the return the stack is aligned as after a call
  *top = (void *)emu_fiber_main;
  f->sp = top - 6;
  memset(f->sp, 0, 6 * sizeof(void *));
#endif
  f->state = EMU_READY;
  f->group = 0;
  f->copies.clear();
}

EMU_FN bool emu_runnable(const EmuFiber *f) {
  if (f->state == EMU_AT_BARRIER) return emu.generation != f->ticket;
  if (f->state == EMU_AT_WARP) return emu.warp[f->warp].generation != f->ticket;
  return f->state == EMU_READY;
}

EMU_FN void emu_wait(int state, unsigned ticket) {
  emu.current->state = state;
  emu.current->ticket = ticket;
  emu_switch(emu.current, &emu.scheduler);
}

// Runs the threads of one warp as far as they come without the other warps, so that a warp that need not wait is far ahead of the
// others. Returns how many of them ended.
EMU_FN int emu_run_warp(int warp, bool *progress) {
  int ended = 0;
  for (bool again = true; again;) {
    again = false;
    for (int k = 0; k < emu.warp[warp].lanes; k++) {
      EmuFiber *f = &emu.fiber[warp * 32 + (emu_order ? emu.warp[warp].lanes - 1 - k : k)];
      if (!emu_runnable(f)) continue;
      again = *progress = true;
      f->state = EMU_READY;
      emu.current = f;
      threadIdx = f->index;
      emu_switch(&emu.scheduler, f);
      ended += f->state == EMU_DONE;
    }
  }
  return ended;
}

// Runs one block to its end.
EMU_FN void emu_block(size_t shared_bytes) {
  emu.shared = (unsigned char *)malloc(shared_bytes ? shared_bytes : 1);
  memset(emu.shared, 0xFF, shared_bytes);
  emu.arrived = 0;
  for (int i = 0; i < emu.threads; i++) {
    EmuFiber *f = &emu.fiber[i];
    f->index.x = (unsigned)i % blockDim.x;
    f->index.y = (unsigned)i / blockDim.x % blockDim.y;
    f->index.z = (unsigned)i / (blockDim.x * blockDim.y);
    f->warp = i / 32;
    f->lane = i % 32;
    emu_fiber_start(f);
  }
  for (int w = 0; w * 32 < emu.threads; w++) {
    emu.warp[w].arrived = 0;
    emu.warp[w].lanes = emu.threads - w * 32 < 32 ? emu.threads - w * 32 : 32;
  }
  int warps = (emu.threads + 31) / 32;
  for (int left = emu.threads; left > 0;) {
    bool progress = false;
    for (int k = 0; k < warps; k++) {
      left -= emu_run_warp(emu_order ? warps - 1 - k : k, &progress);
    }
    if (!progress) emu_die("deadlock: a barrier or a warp operation that not all of its threads reach");
  }
  free(emu.shared);
  emu.shared = NULL;
}

struct EmuAllowance {   // what cudaFuncSetAttribute has granted to a kernel
  const void *kernel;
  size_t bytes;
};
static std::vector<EmuAllowance> emu_allowances;

typedef std::vector<std::function<void()>> EmuGraph;
static EmuGraph *emu_recording;   // where work goes instead of being done, between BeginCapture and EndCapture

// Work on the stream: done at once, or recorded.
template <class Work>
static void emu_stream(const Work &work) {
  if (emu_recording) emu_recording->push_back(work);
  else work();
}

template <class Body>
static void emu_launch(const char *name, const void *kernel, dim3 grid, dim3 block, size_t shared_bytes, const Body &body) {
  size_t allowed = EMU_SHARED_DEFAULT;
  for (const EmuAllowance &a : emu_allowances) {
    if (a.kernel == kernel) allowed = a.bytes;
  }
  emu.kernel = name;
  emu.threads = (int)(block.x * block.y * block.z);
  if (emu.threads < 1 || emu.threads > EMU_MAX_THREADS) emu_die("a block of no or more than 1024 threads");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1) emu_die("an empty grid");
  if (grid.x > 0x7FFFFFFFu || grid.y > 65535 || grid.z > 65535) emu_die("a grid larger than 2^31-1 x 65535 x 65535");
  if (shared_bytes > allowed) emu_die("more dynamic shared memory than allowed");
  blockDim = block;
  gridDim = grid;
  emu.body = &body;
  emu.call = [](const void *b) { (*(const Body *)b)(); };
  size_t blocks = (size_t)grid.x * grid.y * grid.z;
  for (size_t k = 0; k < blocks; k++) {
    size_t b = emu_order ? blocks - 1 - k : k;
    blockIdx.x = (unsigned)(b % grid.x);
    blockIdx.y = (unsigned)(b / grid.x % grid.y);
    blockIdx.z = (unsigned)(b / grid.x / grid.y);
    emu_block(shared_bytes);
  }
  emu.kernel = NULL;
}

// A kernel with its parameters' types, so that arguments are converted and copied when it is launched, not when it runs.
template <class... P>
struct EmuKernel {
  void (*kernel)(P...);
  void launch(const char *name, dim3 grid, dim3 block, size_t shared_bytes, P... p) const {
    void (*k)(P...) = kernel;
    emu_stream([=] { emu_launch(name, (const void *)k, grid, block, shared_bytes, [&] { k(p...); }); });
  }
};

template <class... P>
static EmuKernel<P...> emu_kernel(void (*kernel)(P...)) {
  return {kernel};
}

#define LAUNCH(kernel, grid, block, shared_bytes, ...) emu_kernel(kernel).launch(#kernel, grid, block, shared_bytes, __VA_ARGS__)
#define SHARED_DYNAMIC(Type, name) Type *name = (Type *)emu.shared

// ---------------------------------------------------------------------------------------------------------
// Barriers and what the lanes of a warp do together.

EMU_FN void __syncthreads() {
  if (++emu.arrived == emu.threads) {
    emu.arrived = 0;
    emu.generation++;
  } else {
    emu_wait(EMU_AT_BARRIER, emu.generation);
  }
}

// Each lane of the mask brings n bytes; returns what lane 0..31 brought, EMU_SLOT bytes apart, valid until the next collective.
EMU_FN const unsigned char *emu_exchange(unsigned mask, const void *value, size_t n) {
  EmuFiber *f = emu.current;
  EmuWarp *w = &emu.warp[f->warp];
  unsigned parity = w->generation & 1;
  if (w->lanes != 32) emu_die("a warp operation in an incomplete warp");
  if (!(mask >> f->lane & 1)) emu_die("a lane that its own mask leaves out");
  if (w->arrived > 0 && w->mask != mask) emu_die("lanes of one operation with different masks");
  w->mask = mask;
  memcpy(w->slot[parity][f->lane], value, n);
  if (++w->arrived == __builtin_popcount(mask)) {
    w->arrived = 0;
    w->generation++;
  } else {
    emu_wait(EMU_AT_WARP, w->generation);
  }
  return w->slot[parity][0];
}

EMU_FN void __syncwarp(unsigned mask = 0xFFFFFFFFu) {
  emu_exchange(mask, &mask, 0);
}

template <class T>
static T emu_from_lane(unsigned mask, T v, int lane) {
  T out;
  memcpy(&out, emu_exchange(mask, &v, sizeof v) + lane * EMU_SLOT, sizeof out);
  return out;
}

EMU_FN unsigned long long atomicAdd(unsigned long long *p, unsigned long long v) {
  unsigned long long old = *p;
  *p += v;
  return old;
}

template <class T>
static T __shfl_xor_sync(unsigned mask, T v, int bits) {
  return emu_from_lane(mask, v, emu.current->lane ^ bits);
}

template <class T>
static T __shfl_sync(unsigned mask, T v, int lane) {
  return emu_from_lane(mask, v, lane & 31);
}

template <class T>
static T __shfl_up_sync(unsigned mask, T v, int by) {
  int lane = emu.current->lane;
  return emu_from_lane(mask, v, lane >= by ? lane - by : lane);
}

EMU_FN int __any_sync(unsigned mask, int predicate) {
  const unsigned char *slots = emu_exchange(mask, &predicate, sizeof predicate);
  int any = 0;
  for (int lane = 0; lane < 32; lane++) {
    int p;
    memcpy(&p, slots + lane * EMU_SLOT, sizeof p);
    if (mask >> lane & 1) any |= p != 0;
  }
  return any;
}

// ---------------------------------------------------------------------------------------------------------
// Numbers.

struct __nv_bfloat16 {
  uint16_t bits;
};

EMU_FN float __bfloat162float(__nv_bfloat16 x) {
  uint32_t u = (uint32_t)x.bits << 16;
  float f;
  memcpy(&f, &u, 4);
  return f;
}

EMU_FN __nv_bfloat16 __float2bfloat16(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  __nv_bfloat16 x;
  if ((u & 0x7FFFFFFFu) > 0x7F800000u) x.bits = 0x7FFF;
  else x.bits = (uint16_t)((u + 0x7FFFu + (u >> 16 & 1u)) >> 16);
  return x;
}

using std::isfinite;
using std::min;

EMU_FN float __fmul_rn(float a, float b) {
  return a * b;
}

EMU_FN float __fadd_rn(float a, float b) {
  return a + b;
}

EMU_FN int __dp4a(int a, int b, int c) {
  for (int i = 0; i < 4; i++) c += (int8_t)((uint32_t)a >> 8 * i) * (int8_t)((uint32_t)b >> 8 * i);
  return c;
}

// ---------------------------------------------------------------------------------------------------------
// The instructions that products.cuh wraps in inline assembly; the layouts are those of the PTX manual. g = lane / 4, t = lane % 4.

// One element of a fragment register of another lane.
EMU_FN float emu_bf16_of(const unsigned char *slots, int lane, int word, int half) {
  __nv_bfloat16 x;
  memcpy(&x, slots + lane * EMU_SLOT + word * 4 + half * 2, 2);
  return __bfloat162float(x);
}

// mma.m16n8k16: c[16,8] += a[16,16] b[16,8] in bf16. This lane's c: rows g and g+8, columns 2t and 2t+1.
EMU_FN void mma_bf16(float *c, const uint32_t *a, const uint32_t *b) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char *slots = emu_exchange(0xFFFFFFFFu, mine, sizeof mine);
  int g = emu.current->lane / 4, t = emu.current->lane % 4;
  for (int i = 0; i < 4; i++) {
    int row = g + i / 2 * 8, n = 2 * t + i % 2;
    for (int k = 0; k < 16; k++) {
      float x = emu_bf16_of(slots, row % 8 * 4 + k % 8 / 2, row / 8 + k / 8 * 2, k % 2);
      c[i] += x * emu_bf16_of(slots, n * 4 + k % 8 / 2, 4 + k / 8, k % 2);
    }
  }
}

// mma.m16n8k32: c[16,8] += a[16,32] b[32,8] in int8, summed in int32.
EMU_FN void mma_i8(int *c, const uint32_t *a, const uint32_t *b) {
  uint32_t mine[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
  const unsigned char *slots = emu_exchange(0xFFFFFFFFu, mine, sizeof mine);
  int g = emu.current->lane / 4, t = emu.current->lane % 4;
  for (int i = 0; i < 4; i++) {
    int row = g + i / 2 * 8, n = 2 * t + i % 2;
    for (int k = 0; k < 32; k++) {
      int8_t x = (int8_t)slots[(row % 8 * 4 + k % 16 / 4) * EMU_SLOT + (row / 8 + k / 16 * 2) * 4 + k % 4];
      c[i] += x * (int8_t)slots[(n * 4 + k % 16 / 4) * EMU_SLOT + (4 + k / 16) * 4 + k % 4];
    }
  }
}

// Four 8x8 matrices of 16-bit values; lane 8i+r brings the address of row r of matrix i.
EMU_FN void ldmatrix_x4(uint32_t *r, const void *row) {
  if ((uintptr_t)row % 16) emu_die("ldmatrix from an address that is not a multiple of 16");
  const unsigned char *slots = emu_exchange(0xFFFFFFFFu, &row, sizeof row);
  int g = emu.current->lane / 4, t = emu.current->lane % 4;
  for (int i = 0; i < 4; i++) {
    const char *p;
    memcpy(&p, slots + (8 * i + g) * EMU_SLOT, sizeof p);
    memcpy(&r[i], p + 4 * t, 4);
  }
  __syncwarp();   // nobody overwrites the matrices before all have read
}

EMU_FN void ldmatrix_x4_trans(uint32_t *r, const void *row) {
  if ((uintptr_t)row % 16) emu_die("ldmatrix from an address that is not a multiple of 16");
  const unsigned char *slots = emu_exchange(0xFFFFFFFFu, &row, sizeof row);
  int g = emu.current->lane / 4, t = emu.current->lane % 4;
  for (int i = 0; i < 4; i++) {
    uint16_t pair[2];
    for (int h = 0; h < 2; h++) {
      const char *p;
      memcpy(&p, slots + (8 * i + 2 * t + h) * EMU_SLOT, sizeof p);
      memcpy(&pair[h], p + 2 * g, 2);
    }
    memcpy(&r[i], pair, 4);
  }
  __syncwarp();
}

EMU_FN void emu_do_copy(const EmuCopy *c) {
  if (c->src) memcpy(c->dst, c->src, (size_t)c->bytes);
  else memset(c->dst, 0, (size_t)c->bytes);
}

// 16 bytes from device memory to shared memory, or 16 zero bytes. The hardware may do it at any moment until the wait: in
// descending order it is done at once, in ascending order at the wait, so that both "too early" and "too late" have a chance to
// be wrong.
EMU_FN void cp_async16(void *dst, const void *src, bool valid) {
  if ((uintptr_t)dst % 16 || (valid && (uintptr_t)src % 16)) emu_die("cp.async between addresses that are not multiples of 16");
  EmuCopy copy = {dst, valid ? src : NULL, 16, emu.current->group};
  emu.current->copies.push_back(copy);
  if (emu_order) emu_do_copy(&copy);
}

EMU_FN void cp_async_commit() {
  emu.current->group++;
}

// Waits until at most N committed groups are under way.
template <int N>
static void cp_async_wait() {
  EmuFiber *f = emu.current;
  std::vector<EmuCopy> later;
  for (const EmuCopy &c : f->copies) {
    if (c.group >= f->group - N) later.push_back(c);
    else if (!emu_order) emu_do_copy(&c);
  }
  f->copies.swap(later);
}

// ---------------------------------------------------------------------------------------------------------
// The runtime.

typedef int cudaError_t;
typedef void *cudaStream_t;
enum { cudaSuccess = 0, cudaErrorMemoryAllocation = 2 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaDeviceProp {
  char name[256];
  int major, minor, multiProcessorCount;
  size_t sharedMemPerBlockOptin;
};

EMU_FN const char *cudaGetErrorString(cudaError_t e) {
  return e == cudaSuccess ? "no error" : "out of memory";
}

EMU_FN cudaError_t cudaGetLastError() {
  return cudaSuccess;
}

EMU_FN cudaError_t cudaGetDeviceCount(int *n) {
  *n = 1;
  return cudaSuccess;
}

EMU_FN cudaError_t cudaSetDevice(int) {
  return cudaSuccess;
}

EMU_FN cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  memset(p, 0, sizeof *p);
  snprintf(p->name, sizeof p->name, "emulated on the CPU");
  p->major = 8;
  p->multiProcessorCount = 1;
  p->sharedMemPerBlockOptin = EMU_SHARED_MOST;
  return cudaSuccess;
}

EMU_FN cudaError_t cudaStreamCreate(cudaStream_t *s) {
  *s = NULL;
  return cudaSuccess;
}

EMU_FN cudaError_t cudaStreamSynchronize(cudaStream_t) {
  if (emu_recording) emu_die("the host waits for work that is only being recorded");
  return cudaSuccess;
}

typedef EmuGraph *cudaGraph_t, *cudaGraphExec_t;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal };

EMU_FN cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) {
  if (emu_recording) emu_die("a recording inside a recording");
  emu_recording = new EmuGraph;
  return cudaSuccess;
}

EMU_FN cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *g) {
  *g = emu_recording;
  emu_recording = NULL;
  return cudaSuccess;
}

EMU_FN cudaError_t cudaGraphInstantiate(cudaGraphExec_t *exec, cudaGraph_t g, unsigned long long) {
  *exec = new EmuGraph(*g);
  return cudaSuccess;
}

EMU_FN cudaError_t cudaGraphDestroy(cudaGraph_t g) {
  delete g;
  return cudaSuccess;
}

EMU_FN cudaError_t cudaGraphExecDestroy(cudaGraphExec_t g) {
  delete g;
  return cudaSuccess;
}

EMU_FN cudaError_t cudaGraphLaunch(cudaGraphExec_t g, cudaStream_t) {
  for (const std::function<void()> &work : *g) work();
  return cudaSuccess;
}

template <class T>
static cudaError_t cudaMalloc(T **p, size_t bytes) {
  void *memory;
  if (posix_memalign(&memory, 256, bytes ? bytes : 1) != 0) return cudaErrorMemoryAllocation;
  memset(memory, 0xFF, bytes);
  *p = (T *)memory;
  return cudaSuccess;
}

template <class T>
static cudaError_t cudaMallocHost(T **p, size_t bytes) {
  *p = (T *)malloc(bytes);
  return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}

EMU_FN cudaError_t cudaFree(void *p) {
  free(p);
  return cudaSuccess;
}

EMU_FN cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
  *free_bytes = *total = (size_t)4 << 30;
  return cudaSuccess;
}

EMU_FN cudaError_t cudaMemsetAsync(void *p, int value, size_t bytes, cudaStream_t) {
  emu_stream([=] { memset(p, value, bytes); });
  return cudaSuccess;
}

EMU_FN cudaError_t cudaMemcpyAsync(void *dst, const void *src, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  if (emu_recording && kind != cudaMemcpyDeviceToDevice) emu_die("a copy from or to the host inside a recording");
  emu_stream([=] { memcpy(dst, src, bytes); });
  return cudaSuccess;
}

template <class Kernel>
static cudaError_t cudaFuncSetAttribute(Kernel *kernel, cudaFuncAttribute, int bytes) {
  if (bytes > EMU_SHARED_MOST) emu_die("more shared memory than a multiprocessor has");
  for (EmuAllowance &a : emu_allowances) {
    if (a.kernel == (const void *)kernel) {
      a.bytes = (size_t)bytes;
      return cudaSuccess;
    }
  }
  EmuAllowance a = {(const void *)kernel, (size_t)bytes};
  emu_allowances.push_back(a);
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------------------
// cuBLASLt: descriptors remember what they are told; the product is three loops. Column-major, as the library's is.

enum cudaDataType_t { CUDA_R_32F, CUDA_R_16BF, CUDA_R_8I, CUDA_R_32I };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F, CUBLAS_COMPUTE_32I };
enum cublasOperation_t { CUBLAS_OP_N, CUBLAS_OP_T };
enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_INVALID_VALUE = 7, CUBLAS_STATUS_NOT_SUPPORTED = 15 };
enum cublasLtPointerMode_t { CUBLASLT_POINTER_MODE_HOST, CUBLASLT_POINTER_MODE_DEVICE };
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA, CUBLASLT_MATMUL_DESC_TRANSB, CUBLASLT_MATMUL_DESC_POINTER_MODE };
enum cublasLtMatmulPreferenceAttributes_t {
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
      CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, EMU_PREFS
};

typedef int *cublasLtHandle_t;
typedef struct {
  cublasComputeType_t compute;
  cudaDataType_t scale;
  int32_t attribute[3];
} cublasLtMatmulDescOpaque_t;
typedef cublasLtMatmulDescOpaque_t *cublasLtMatmulDesc_t;
typedef struct {
  cudaDataType_t type;
  uint64_t rows, cols;
  int64_t ld;
} cublasLtMatrixLayoutOpaque_t;
typedef cublasLtMatrixLayoutOpaque_t *cublasLtMatrixLayout_t;
typedef struct {
  uint64_t attribute[EMU_PREFS];
} cublasLtMatmulPreferenceOpaque_t;
typedef cublasLtMatmulPreferenceOpaque_t *cublasLtMatmulPreference_t;
typedef struct {
  uint64_t alignment[4];   // of A, B, C, D for which it was chosen
} cublasLtMatmulAlgo_t;
typedef struct {
  cublasLtMatmulAlgo_t algo;
  size_t workspaceSize;
  cublasStatus_t state;
} cublasLtMatmulHeuristicResult_t;

EMU_FN cublasStatus_t cublasLtCreate(cublasLtHandle_t *h) {
  *h = NULL;
  return CUBLAS_STATUS_SUCCESS;
}

EMU_FN cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t d, cublasComputeType_t compute, cudaDataType_t scale) {
  memset(d, 0, sizeof *d);
  d->compute = compute;
  d->scale = scale;
  return CUBLAS_STATUS_SUCCESS;
}

EMU_FN cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t d, cublasLtMatmulDescAttributes_t a, const void *v,
                                                     size_t n) {
  if (n != sizeof(int32_t)) return CUBLAS_STATUS_INVALID_VALUE;
  memcpy(&d->attribute[a], v, n);
  return CUBLAS_STATUS_SUCCESS;
}

EMU_FN cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t l, cudaDataType_t type, uint64_t rows, uint64_t cols,
                                               int64_t ld) {
  l->type = type;
  l->rows = rows;
  l->cols = cols;
  l->ld = ld;
  return CUBLAS_STATUS_SUCCESS;
}

EMU_FN cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t p) {
  memset(p, 0, sizeof *p);
  for (int i = CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES; i < EMU_PREFS; i++) p->attribute[i] = 256;
  return CUBLAS_STATUS_SUCCESS;
}

EMU_FN cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t p, cublasLtMatmulPreferenceAttributes_t a,
                                                           const void *v, size_t n) {
  if (n > sizeof p->attribute[a]) return CUBLAS_STATUS_INVALID_VALUE;
  p->attribute[a] = 0;
  memcpy(&p->attribute[a], v, n);
  return CUBLAS_STATUS_SUCCESS;
}

// Shapes that fit, and the library's own conditions for integer products. M, N, K of D [M,N] = op(A) op(B).
EMU_FN cublasStatus_t emu_blas_check(cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                     cublasLtMatrixLayout_t c) {
  bool ta = d->attribute[CUBLASLT_MATMUL_DESC_TRANSA] == CUBLAS_OP_T, tb = d->attribute[CUBLASLT_MATMUL_DESC_TRANSB] == CUBLAS_OP_T;
  uint64_t M = ta ? a->cols : a->rows, K = ta ? a->rows : a->cols, N = tb ? b->rows : b->cols, K2 = tb ? b->cols : b->rows;
  if (K != K2 || M != c->rows || N != c->cols || a->type != b->type) return CUBLAS_STATUS_INVALID_VALUE;
  if (a->ld < (int64_t)a->rows || b->ld < (int64_t)b->rows || c->ld < (int64_t)c->rows) return CUBLAS_STATUS_INVALID_VALUE;
  if (a->type == CUDA_R_8I) {
    bool fits = ta && !tb && M % 4 == 0 && K % 4 == 0 && a->ld % 4 == 0 && b->ld % 4 == 0 && c->ld % 4 == 0;
    return fits && c->type == CUDA_R_32I && d->compute == CUBLAS_COMPUTE_32I && d->scale == CUDA_R_32I ? CUBLAS_STATUS_SUCCESS
        : CUBLAS_STATUS_NOT_SUPPORTED;
  }
  if (d->compute != CUBLAS_COMPUTE_32F || d->scale != CUDA_R_32F) return CUBLAS_STATUS_NOT_SUPPORTED;
  if (a->type == CUDA_R_16BF) return c->type == CUDA_R_16BF || c->type == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS
      : CUBLAS_STATUS_NOT_SUPPORTED;
  return a->type == CUDA_R_32F && c->type == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_NOT_SUPPORTED;
}

EMU_FN cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t d, cublasLtMatrixLayout_t a,
                                                     cublasLtMatrixLayout_t b,
                                                     cublasLtMatrixLayout_t, cublasLtMatrixLayout_t out,
                                                         cublasLtMatmulPreference_t p, int,
                                                     cublasLtMatmulHeuristicResult_t *result, int *count) {
  cublasStatus_t status = emu_blas_check(d, a, b, out);
  memset((void *)result, 0, sizeof *result);
  memcpy(result->algo.alignment, p->attribute + CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, sizeof result->algo.alignment);
  *count = status == CUBLAS_STATUS_SUCCESS;
  return status;
}

EMU_FN double emu_blas_get(const void *p, cudaDataType_t type, size_t i) {
  switch (type) {
    case CUDA_R_32F: return (double)((const float *)p)[i];
    case CUDA_R_16BF: return (double)__bfloat162float(((const __nv_bfloat16 *)p)[i]);
    case CUDA_R_8I: return (double)((const int8_t *)p)[i];
    default: return (double)((const int32_t *)p)[i];
  }
}

EMU_FN cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t d, const void *alpha, const void *A,
                                     cublasLtMatrixLayout_t a, const void *B,
                                     cublasLtMatrixLayout_t b, const void *beta, const void *C, cublasLtMatrixLayout_t c, void *D,
                                     cublasLtMatrixLayout_t out, const cublasLtMatmulAlgo_t *algo, void *, size_t, cudaStream_t) {
  cublasStatus_t status = emu_blas_check(d, a, b, out);
  if (emu_recording) emu_die("a product of the library inside a recording: not imitated");
  if (status != CUBLAS_STATUS_SUCCESS) return status;
  const void *pointers[4] = {A, B, C, D};
  for (int i = 0; i < 4; i++) {
    if ((uintptr_t)pointers[i] % algo->alignment[i]) return CUBLAS_STATUS_INVALID_VALUE;
    if (a->type == CUDA_R_8I && (uintptr_t)pointers[i] % 4) return CUBLAS_STATUS_NOT_SUPPORTED;
  }
  bool ta = d->attribute[CUBLASLT_MATMUL_DESC_TRANSA] == CUBLAS_OP_T, tb = d->attribute[CUBLASLT_MATMUL_DESC_TRANSB] == CUBLAS_OP_T;
  size_t K = ta ? a->rows : a->cols, lda = (size_t)a->ld, ldb = (size_t)b->ld;
  double scale = d->scale == CUDA_R_32I ? (double)*(const int32_t *)alpha : (double)*(const float *)alpha;
  double keep = d->scale == CUDA_R_32I ? (double)*(const int32_t *)beta : (double)*(const float *)beta;
  for (size_t j = 0; j < out->cols; j++) {
    for (size_t i = 0; i < out->rows; i++) {
      double sum = 0;
      for (size_t k = 0; k < K; k++) sum += emu_blas_get(A, a->type, ta ? i * lda + k : k * lda + i) * emu_blas_get(B, b->type, tb
          ? k * ldb + j : j * ldb + k);
      sum *= scale;
      if (keep != 0) sum += keep * emu_blas_get(C, c->type, j * (size_t)c->ld + i);
      size_t at = j * (size_t)out->ld + i;
      if (out->type == CUDA_R_32F) ((float *)D)[at] = (float)sum;
      else if (out->type == CUDA_R_16BF) ((__nv_bfloat16 *)D)[at] = __float2bfloat16((float)sum);
      else ((int32_t *)D)[at] = (int32_t)sum;
    }
  }
  return CUBLAS_STATUS_SUCCESS;
}

#endif
