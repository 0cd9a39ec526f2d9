/*
attention.cuh: attention on the GPU: training forward and backward, and decoding against a cache.

What it is:  a chapter of train_bitnet.cu in a file of its own, included there at its place in the network. Tensor-core kernels
             for bf16 heads of 64 and 128, plain kernels for every other head size and for fp32, and the launchers that choose.
What not:    the mathematics: train_bitnet.c derives it. Instructions and fragments: products.cuh, "Tensor core instructions".
Read before: train_bitnet.cu up to this place.
Defines:     attention_forward, attention_backward, attention_cached of bitnet/ops.h.
*/
#ifndef BITNET_ATTENTION_CUH
#define BITNET_ATTENTION_CUH

// ---------------------------------------------------------------------------------------------------------
/*
Attention with tensor cores ("flash attention"), bf16, heads of 64 or 128.

A block of four warps takes 64 queries of one head, a warp 16 of them. Keys and values come in tiles of 64 positions through
shared memory. For each tile: scores S = Q K' (tensor cores), the running softmax of train_bitnet.c on the scores while they are
in registers, then O += P V (tensor cores again: the layout of mma's result c is that of an operand a, so P never leaves the
registers). Two tiles are in shared memory: one is used while cp.async brings the next.

Tiles of keys are counted from the start of a document, so that a row gets the same bits wherever its document lies. Where several
documents meet in a block's 64 queries, they are gone through one after the other, and queries of another document see nothing: that
leaves their sums as they are, bit for bit. Exponentials are to base 2, with log2(e) in the factor of the scores.
*/
enum { ATT_TILE = 64, ATT_WARPS = 4, ATT_THREADS = ATT_WARPS * WARP };
#define LOG2E 1.4426950408889634f
#define LN2 0.6931471805599453f

// ROWS x HS values from device memory (rows `stride` apart) to a tile [ROWS][HS+8] in shared memory; rows from `valid` on become
// zeros.
template <int HS, int ROWS>
__device__ inline void tile_fetch(bf16 *tile, const bf16 *from, size_t stride, int valid) {
  for (int i = threadIdx.x; i < ROWS * HS / 8; i += ATT_THREADS) {
    int row = i / (HS / 8), col = i % (HS / 8) * 8;
    cp_async16(tile + row * (HS + 8) + col, from + (size_t)row * stride + col, row < valid);
  }
}

// The least document start among positions t0 .. t0+n-1; every warp finds it by itself.
__device__ inline int least_start(const int *start, int t0, int n, int T) {
  float low = (float)T;   // positions are exact in float
  for (int t = t0 + (int)(threadIdx.x % WARP); t < t0 + n && t < T; t += WARP) low = fminf(low, (float)start[t]);
  return (int)-warp_max(-low);
}

// Walks over the tiles of keys that the queries t0 .. end-1 need. Every warp computes the same.
struct KeyTiles {
  int j0, s, doc_end, end;   // this tile; its document's start; where the document ends among the queries; the queries' end

  // The first query after t that belongs to another document than the one that starts at s, or end.
  __device__ int document_end(const int *start, int t) const {
    float found = (float)end;
    for (int i = t + (int)(threadIdx.x % WARP); i < end; i += WARP) {
      if (start[i] != s) found = fminf(found, (float)i);
    }
    return (int)-warp_max(-found);
  }

  __device__ void first(const int *start, int t0, int end_) {
    end = end_;
    j0 = s = start[t0];
    doc_end = document_end(start, t0);
  }

  __device__ bool more() const {
    return j0 < end;
  }

  __device__ void next(const int *start) {
    j0 += ATT_TILE;
    if (j0 < doc_end) return;
    j0 = s = doc_end;         // a document starts where the one before it ends
    if (j0 < end) doc_end = document_end(start, j0);
  }
};

// The running maximum m takes in the largest score of a tile; returns what exponents are counted from, and in *shrink the factor for
// the sums so far. A row that has seen nothing yet has m = -infinity, and its sums are 0.
__device__ inline float softmax_advance(float *m, float *shrink, float top, float scale2) {
  float old = *m;
  *m = fmaxf(old, top * scale2);
  float base = *m == -INFINITY ? 0.0f : *m;
  *shrink = exp2f(old - base);
  return base;
}

// Largest value over the four lanes that share a row of mma's result, and their sum.
__device__ inline float quad_max(float v) {
  v = fmaxf(v, __shfl_xor_sync(FULL, v, 1));
  return fmaxf(v, __shfl_xor_sync(FULL, v, 2));
}

__device__ inline float quad_sum(float v) {
  v += __shfl_xor_sync(FULL, v, 1);
  return v + __shfl_xor_sync(FULL, v, 2);
}

// Operand a (16 rows x 16 k) from two neighbouring results c (16 x 8 each).
__device__ inline void result_as_a(uint32_t *a, const float *c0, const float *c1) {
  a[0] = pack_bf16(c0[0], c0[1]);
  a[1] = pack_bf16(c0[2], c0[3]);
  a[2] = pack_bf16(c1[0], c1[1]);
  a[3] = pack_bf16(c1[2], c1[3]);
}

// dst: an even position of a head.
__device__ inline void store_pair(bf16 *dst, float low, float high) {
  *(uint32_t *)dst = pack_bf16(low, high);
}

template <int HS>
__global__ void __launch_bounds__(ATT_THREADS)
flash_forward_kernel(bf16 *out, float *lse, const bf16 *qkv, const int *start, int T, int NH, int NKV) {
  constexpr int S = HS + 8, STEPS = HS / 16, TILE = ATT_TILE * S;
  SHARED_DYNAMIC(bf16, shared);   // Q, then twice K and V
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t4 = lane % 4;
  int t0 = (int)(gridDim.x - 1 - blockIdx.x) * ATT_TILE, h = blockIdx.y, b = blockIdx.z;   // the longest rows start first
  size_t QKV = (size_t)(NH + 2 * NKV) * HS;
  const bf16 *base = qkv + (size_t)b * T * QKV, *k = base + (size_t)(NH + h / (NH / NKV)) * HS, *v = k + (size_t)NKV * HS;
  start += (size_t)b * T;
  int row[2], row_start[2];
  for (int i = 0; i < 2; i++) {
    row[i] = t0 + warp * 16 + g + 8 * i;
    row_start[i] = row[i] < T ? start[row[i]] : T;   // rows beyond the end see nothing
  }
  KeyTiles at, ahead;
  at.first(start, t0, min(t0 + ATT_TILE, T));
  float scale2 = LOG2E / sqrtf((float)HS), m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, o[HS / 8][4] = {};
  uint32_t q[STEPS][4];
  tile_fetch<HS, ATT_TILE>(shared, base + (size_t)t0 * QKV + (size_t)h * HS, QKV, T - t0);
  tile_fetch<HS, ATT_TILE>(shared + TILE, k + (size_t)at.j0 * QKV, QKV, T - at.j0);
  tile_fetch<HS, ATT_TILE>(shared + 2 * TILE, v + (size_t)at.j0 * QKV, QKV, T - at.j0);
  cp_async_commit();
  bool begun = false;
  for (int stage = 0; at.more(); at = ahead, stage ^= 1) {
    ahead = at;
    ahead.next(start);
    if (ahead.more()) {
      bf16 *next = shared + (1 + 2 * (stage ^ 1)) * TILE;
      tile_fetch<HS, ATT_TILE>(next, k + (size_t)ahead.j0 * QKV, QKV, T - ahead.j0);
      tile_fetch<HS, ATT_TILE>(next + TILE, v + (size_t)ahead.j0 * QKV, QKV, T - ahead.j0);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const bf16 *ks = shared + (1 + 2 * stage) * TILE, *vs = ks + TILE;
    if (!begun) {
#pragma unroll
      for (int st = 0; st < STEPS; st++) fragment_a(q[st], shared, S, warp * 16, st * 16);
      begun = true;
    }
    float s[8][4] = {};
#pragma unroll
    for (int n = 0; n < 8; n += 2) {
#pragma unroll
      for (int st = 0; st < STEPS; st++) {
        uint32_t kb[4];
        fragment_b(kb, ks, S, n * 8, st * 16);
        mma_bf16(s[n], q[st], kb);
        mma_bf16(s[n + 1], q[st], kb + 2);
      }
    }
    if (at.j0 + ATT_TILE > t0 || at.doc_end < at.end) {   // only here some query must not see some key
#pragma unroll
      for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (at.j0 + n * 8 + 2 * t4 + i % 2 > row[i / 2] || row_start[i / 2] != at.s) s[n][i] = -INFINITY;
        }
      }
    }
    for (int i = 0; i < 2; i++) {
      float top = -INFINITY, shrink;
#pragma unroll
      for (int n = 0; n < 8; n++) top = fmaxf(top, fmaxf(s[n][2 * i], s[n][2 * i + 1]));
      float from = softmax_advance(&m[i], &shrink, quad_max(top), scale2);
      l[i] = __fmul_rn(l[i], shrink);   // never fused with the addition: the cached kernel must round alike
#pragma unroll
      for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int c = 2 * i; c < 2 * i + 2; c++) {
          s[n][c] = exp2f(fmaf(s[n][c], scale2, -from));
          l[i] = __fadd_rn(l[i], s[n][c]);
        }
      }
#pragma unroll
      for (int d = 0; d < HS / 8; d++) {
        o[d][2 * i] *= shrink;
        o[d][2 * i + 1] *= shrink;
      }
    }
#pragma unroll
    for (int st = 0; st < 4; st++) {
      uint32_t p[4], vb[4];
      result_as_a(p, s[2 * st], s[2 * st + 1]);
#pragma unroll
      for (int d = 0; d < HS / 8; d += 2) {
        fragment_b_trans(vb, vs, S, st * 16, d * 8);
        mma_bf16(o[d], p, vb);
        mma_bf16(o[d + 1], p, vb + 2);
      }
    }
    __syncthreads();   // all warps are done with this stage before it is filled again
  }
  for (int i = 0; i < 2; i++) {
    float sum = quad_sum(l[i]);
    if (row[i] >= T) continue;
    size_t bt = (size_t)b * T + row[i];
    float inverse = 1.0f / sum;
#pragma unroll
    for (int d = 0; d < HS / 8; d++) {
      store_pair(out + (bt * NH + h) * HS + d * 8 + 2 * t4, o[d][2 * i] * inverse, o[d][2 * i + 1] * inverse);
    }
    if (t4 == 0) lse[bt * NH + h] = (m[i] + log2f(sum)) * LN2;
  }
}

/*
Backward. s_j = scale q.k_j, p_j = exp(s_j - lse), D = do.o, ds_j = p_j (do.v_j - D) scale; dv_j += p_j do, dk_j += ds_j q, dq +=
ds_j k_j (derived in train_bitnet.c). Three kernels, so that every gradient has one owner and nothing is added atomically; the
price is that scores are computed twice:
    D      one number for each query and head. It is left in the first bytes of that head's dq, which is written last.
    kv     a block owns 64 keys of one key/value head, a warp 16 of them, and goes through the queries of all heads that share it
    q      a block owns 64 queries of one head and goes through the keys, as the forward pass does
Queries come 32 at a time in kv, keys 32 at a time in q: two accumulators of HS columns leave no room for more registers.
*/
enum { ATT_HALF = 32 };

template <class T>
__global__ void attention_dots_kernel(T *dqkv, const T *dout, const T *out, size_t n, int NH, int NKV, int HS) {
  size_t item = (size_t)blockIdx.x * ATT_WARPS + threadIdx.x / WARP;   // bt * NH + h
  if (item >= n) return;
  float sum = 0;
  for (int i = threadIdx.x % WARP; i < HS; i += WARP) sum += to_float(dout[item * HS + i]) * to_float(out[item * HS + i]);
  sum = warp_sum(sum);
  T *slot = dqkv + item / NH * (NH + 2 * NKV) * HS + item % NH * HS;
  if (threadIdx.x % WARP == 0) memcpy(slot, &sum, sizeof sum);
}

// The number that attention_dots_kernel left at the start of a head's dq.
template <class T>
__device__ inline float dot_of(const T *slot) {
  float D;
  memcpy(&D, slot, sizeof D);
  return D;
}

// s (+=) a x', t (+=) b y': the warp's 16 x 32 values for rows row0 .. row0+15 of the tiles a and b and 32 rows of the tiles x and y.
template <int HS>
__device__ inline void two_products(float (&s)[4][4], float (&t)[4][4], const bf16 *a, const bf16 *b, const bf16 *x, const bf16 *y,
                                    int row0) {
  constexpr int S = HS + 8;
#pragma unroll
  for (int st = 0; st < HS / 16; st++) {
    uint32_t fa[4], fb[4], fx[4], fy[4];
    fragment_a(fa, a, S, row0, st * 16);
    fragment_a(fb, b, S, row0, st * 16);
#pragma unroll
    for (int n = 0; n < 4; n += 2) {
      fragment_b(fx, x, S, n * 8, st * 16);
      fragment_b(fy, y, S, n * 8, st * 16);
      mma_bf16(s[n], fa, fx);
      mma_bf16(s[n + 1], fa, fx + 2);
      mma_bf16(t[n], fb, fy);
      mma_bf16(t[n + 1], fb, fy + 2);
    }
  }
}

template <int HS>
__global__ void __launch_bounds__(ATT_THREADS)
flash_backward_kv_kernel(bf16 *dqkv, const bf16 *dout, const bf16 *qkv, const float *lse, const int *start, int T, int NH, int NKV) {
  constexpr int S = HS + 8;
  SHARED_DYNAMIC(bf16, shared);
  bf16 *ks = shared, *vs = ks + ATT_TILE * S, *qs = vs + ATT_TILE * S, *os = qs + ATT_HALF * S;   // os: do
  __shared__ float lse2[ATT_HALF], D[ATT_HALF];
  __shared__ int starts[ATT_HALF];
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t4 = lane % 4;
  int j0 = blockIdx.x * ATT_TILE, kvh = blockIdx.y, b = blockIdx.z, group = NH / NKV;
  size_t QKV = (size_t)(NH + 2 * NKV) * HS, k_col = (size_t)(NH + kvh) * HS, v_col = k_col + (size_t)NKV * HS;
  const bf16 *base = qkv + (size_t)b * T * QKV;
  float scale = 1.0f / sqrtf((float)HS), dk[HS / 8][4] = {}, dv[HS / 8][4] = {};
  tile_fetch<HS, ATT_TILE>(ks, base + (size_t)j0 * QKV + k_col, QKV, T - j0);
  tile_fetch<HS, ATT_TILE>(vs, base + (size_t)j0 * QKV + v_col, QKV, T - j0);
  for (int h = kvh * group; h < (kvh + 1) * group; h++) {
    for (int t0 = j0; t0 < T; t0 += ATT_HALF) {
      if (least_start(start + (size_t)b * T, t0, ATT_HALF, T) >= j0 + ATT_TILE) continue;   // queries of later documents
      size_t bt0 = (size_t)b * T + t0;
      __syncthreads();                        // the tiles of the round before are no longer needed
      tile_fetch<HS, ATT_HALF>(qs, base + (size_t)t0 * QKV + (size_t)h * HS, QKV, T - t0);
      tile_fetch<HS, ATT_HALF>(os, dout + (bt0 * NH + h) * HS, (size_t)NH * HS, T - t0);
      if (threadIdx.x < ATT_HALF) {
        int i = threadIdx.x;
        bool valid = t0 + i < T;
        lse2[i] = valid ? lse[(bt0 + i) * NH + h] * LOG2E : 0.0f;
        D[i] = valid ? dot_of(dqkv + (bt0 + i) * QKV + (size_t)h * HS) : 0.0f;
        starts[i] = valid ? start[bt0 + i] : T;   // queries beyond the end see nothing
      }
      cp_async_commit();
      cp_async_wait<0>();
      __syncthreads();
      float s[4][4] = {}, dp[4][4] = {};      // 16 keys x 32 queries: K Q' and V do'
      two_products<HS>(s, dp, ks, vs, qs, os, warp * 16);
#pragma unroll
      for (int n = 0; n < 4; n++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
          int c = n * 8 + 2 * t4 + i % 2, j = j0 + warp * 16 + g + i / 2 * 8;
          bool seen = j <= t0 + c && j >= starts[c];
          float p = seen ? exp2f(fmaf(s[n][i], scale * LOG2E, -lse2[c])) : 0.0f;
          dp[n][i] = p * (dp[n][i] - D[c]) * scale;
          s[n][i] = p;
        }
      }
#pragma unroll
      for (int st = 0; st < 2; st++) {
        uint32_t p[4], ds[4], qb[4], ob[4];
        result_as_a(p, s[2 * st], s[2 * st + 1]);
        result_as_a(ds, dp[2 * st], dp[2 * st + 1]);
#pragma unroll
        for (int d = 0; d < HS / 8; d += 2) {
          fragment_b_trans(ob, os, S, st * 16, d * 8);
          fragment_b_trans(qb, qs, S, st * 16, d * 8);
          mma_bf16(dv[d], p, ob);
          mma_bf16(dv[d + 1], p, ob + 2);
          mma_bf16(dk[d], ds, qb);
          mma_bf16(dk[d + 1], ds, qb + 2);
        }
      }
    }
  }
  for (int i = 0; i < 2; i++) {
    int j = j0 + warp * 16 + g + 8 * i;
    if (j >= T) continue;
    bf16 *row = dqkv + ((size_t)b * T + j) * QKV;
#pragma unroll
    for (int d = 0; d < HS / 8; d++) {
      store_pair(row + k_col + d * 8 + 2 * t4, dk[d][2 * i], dk[d][2 * i + 1]);
      store_pair(row + v_col + d * 8 + 2 * t4, dv[d][2 * i], dv[d][2 * i + 1]);
    }
  }
}

template <int HS>
__global__ void __launch_bounds__(ATT_THREADS)
flash_backward_q_kernel(bf16 *dqkv, const bf16 *dout, const bf16 *qkv, const float *lse, const int *start, int T, int NH, int NKV) {
  constexpr int S = HS + 8;
  SHARED_DYNAMIC(bf16, shared);
  bf16 *qs = shared, *os = qs + ATT_TILE * S, *ks = os + ATT_TILE * S, *vs = ks + ATT_HALF * S;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t4 = lane % 4;
  int t0 = (int)(gridDim.x - 1 - blockIdx.x) * ATT_TILE, h = blockIdx.y, b = blockIdx.z;
  size_t QKV = (size_t)(NH + 2 * NKV) * HS;
  const bf16 *base = qkv + (size_t)b * T * QKV, *k = base + (size_t)(NH + h / (NH / NKV)) * HS, *v = k + (size_t)NKV * HS;
  start += (size_t)b * T;
  float scale = 1.0f / sqrtf((float)HS), lse2[2], D[2], dq[HS / 8][4] = {};
  int row[2], row_start[2];
  for (int i = 0; i < 2; i++) {
    row[i] = t0 + warp * 16 + g + 8 * i;
    bool valid = row[i] < T;
    size_t bt = (size_t)b * T + row[i];
    row_start[i] = valid ? start[row[i]] : T;
    lse2[i] = valid ? lse[bt * NH + h] * LOG2E : 0.0f;
    D[i] = valid ? dot_of(dqkv + bt * QKV + (size_t)h * HS) : 0.0f;
  }
  tile_fetch<HS, ATT_TILE>(qs, base + (size_t)t0 * QKV + (size_t)h * HS, QKV, T - t0);
  tile_fetch<HS, ATT_TILE>(os, dout + (((size_t)b * T + t0) * NH + h) * HS, (size_t)NH * HS, T - t0);
  for (int j0 = least_start(start, t0, ATT_TILE, T) / ATT_HALF * ATT_HALF; j0 < t0 + ATT_TILE && j0 < T; j0 += ATT_HALF) {
    __syncthreads();
    tile_fetch<HS, ATT_HALF>(ks, k + (size_t)j0 * QKV, QKV, T - j0);
    tile_fetch<HS, ATT_HALF>(vs, v + (size_t)j0 * QKV, QKV, T - j0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float s[4][4] = {}, dp[4][4] = {};   // 16 queries x 32 keys: Q K' and do V'
    two_products<HS>(s, dp, qs, os, ks, vs, warp * 16);
#pragma unroll
    for (int n = 0; n < 4; n++) {
#pragma unroll
      for (int i = 0; i < 4; i++) {
        int j = j0 + n * 8 + 2 * t4 + i % 2;
        bool seen = j <= row[i / 2] && j >= row_start[i / 2];
        float p = seen ? exp2f(fmaf(s[n][i], scale * LOG2E, -lse2[i / 2])) : 0.0f;
        dp[n][i] = p * (dp[n][i] - D[i / 2]) * scale;
      }
    }
#pragma unroll
    for (int st = 0; st < 2; st++) {
      uint32_t ds[4], kb[4];
      result_as_a(ds, dp[2 * st], dp[2 * st + 1]);
#pragma unroll
      for (int d = 0; d < HS / 8; d += 2) {
        fragment_b_trans(kb, ks, S, st * 16, d * 8);
        mma_bf16(dq[d], ds, kb);
        mma_bf16(dq[d + 1], ds, kb + 2);
      }
    }
  }
  for (int i = 0; i < 2; i++) {
    if (row[i] >= T) continue;
    bf16 *to = dqkv + ((size_t)b * T + row[i]) * QKV + (size_t)h * HS;
#pragma unroll
    for (int d = 0; d < HS / 8; d++) store_pair(to + d * 8 + 2 * t4, dq[d][2 * i], dq[d][2 * i + 1]);
  }
}

/*
Decoding with tensor cores: one query position against the cache. The query heads that share a key/value head are the rows of one
16-row tile (rows that stay empty cost nothing: memory is the limit), a block for each. Its four warps split a tile's work: 16
keys each for the scores, a quarter of the head's columns each for O. Tiles, steps and the order of every sum are those of
flash_forward_kernel, so a decoded position gets the bits that training would give it.
*/
template <int HS>
__global__ void __launch_bounds__(ATT_THREADS)
flash_cached_kernel(bf16 *out, const bf16 *kcache, const bf16 *vcache, const bf16 *qkv, const int *seq, const int *pos,
                    int capacity, int NH, int NKV) {
  constexpr int S = HS + 8, STEPS = HS / 16, TILE = ATT_TILE * S, COLS = HS / ATT_WARPS, P = ATT_TILE + 4;
  SHARED_DYNAMIC(bf16, shared);   // Q (16 rows), then twice K and V
  __shared__ float tops[ATT_WARPS][16], ps[16 * P];
  bf16 *tiles = shared + 16 * S;
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, g = lane / 4, t4 = lane % 4;
  int group = NH / NKV, blocks = (group + 15) / 16, kvh = blockIdx.y / blocks, h0 = kvh * group + blockIdx.y % blocks * 16;
  int heads = min(16, (kvh + 1) * group - h0), last = pos[blockIdx.x];
  size_t r = blockIdx.x, width = (size_t)NKV * HS, first = (size_t)seq[r] * capacity * width + (size_t)kvh * HS;
  const bf16 *k = kcache + first, *v = vcache + first;
  float scale2 = LOG2E / sqrtf((float)HS), m[2] = {-INFINITY, -INFINITY}, l[2] = {0, 0}, o[COLS / 8][4] = {};
  uint32_t q[STEPS][4];
  tile_fetch<HS, 16>(shared, qkv + r * (NH + 2 * NKV) * HS + (size_t)h0 * HS, HS, heads);
  tile_fetch<HS, ATT_TILE>(tiles, k, width, last + 1);
  tile_fetch<HS, ATT_TILE>(tiles + TILE, v, width, last + 1);
  cp_async_commit();
  for (int j0 = 0, stage = 0; j0 <= last; j0 += ATT_TILE, stage ^= 1) {
    if (j0 + ATT_TILE <= last) {
      bf16 *next = tiles + 2 * (stage ^ 1) * TILE;
      tile_fetch<HS, ATT_TILE>(next, k + (size_t)(j0 + ATT_TILE) * width, width, last + 1 - j0 - ATT_TILE);
      tile_fetch<HS, ATT_TILE>(next + TILE, v + (size_t)(j0 + ATT_TILE) * width, width, last + 1 - j0 - ATT_TILE);
    }
    cp_async_commit();
    cp_async_wait<1>();
    __syncthreads();
    const bf16 *ks = tiles + 2 * stage * TILE, *vs = ks + TILE;
    if (j0 == 0) {
#pragma unroll
      for (int st = 0; st < STEPS; st++) fragment_a(q[st], shared, S, 0, st * 16);
    }
    float s[2][4] = {};
#pragma unroll
    for (int st = 0; st < STEPS; st++) {
      uint32_t kb[4];
      fragment_b(kb, ks, S, warp * 16, st * 16);
      mma_bf16(s[0], q[st], kb);
      mma_bf16(s[1], q[st], kb + 2);
    }
    for (int i = 0; i < 2; i++) {
      float top = -INFINITY;
      for (int n = 0; n < 2; n++) {
        for (int c = 2 * i; c < 2 * i + 2; c++) {
          if (j0 + warp * 16 + n * 8 + 2 * t4 + c % 2 > last) s[n][c] = -INFINITY;
          top = fmaxf(top, s[n][c]);
        }
      }
      top = quad_max(top);
      if (t4 == 0) tops[warp][g + 8 * i] = top;
    }
    __syncthreads();
    for (int i = 0; i < 2; i++) {
      float top = -INFINITY, shrink;
      for (int w = 0; w < ATT_WARPS; w++) top = fmaxf(top, tops[w][g + 8 * i]);
      float from = softmax_advance(&m[i], &shrink, top, scale2);
      for (int n = 0; n < 2; n++) {
        float *p = ps + (g + 8 * i) * P + warp * 16 + n * 8 + 2 * t4;
        for (int c = 0; c < 2; c++) p[c] = exp2f(fmaf(s[n][2 * i + c], scale2, -from));
      }
      l[i] = __fmul_rn(l[i], shrink);
      for (int d = 0; d < COLS / 8; d++) {
        o[d][2 * i] *= shrink;
        o[d][2 * i + 1] *= shrink;
      }
    }
    __syncthreads();
    float p[8][4];   // all 64 columns now, as a warp of the training kernel has them
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int n = 0; n < 8; n++) {
#pragma unroll
        for (int c = 2 * i; c < 2 * i + 2; c++) {
          p[n][c] = ps[(g + 8 * i) * P + n * 8 + 2 * t4 + c % 2];
          l[i] = __fadd_rn(l[i], p[n][c]);
        }
      }
    }
#pragma unroll
    for (int st = 0; st < 4; st++) {
      uint32_t a[4], vb[4];
      result_as_a(a, p[2 * st], p[2 * st + 1]);
#pragma unroll
      for (int d = 0; d < COLS / 8; d += 2) {
        fragment_b_trans(vb, vs, S, st * 16, warp * COLS + d * 8);
        mma_bf16(o[d], a, vb);
        mma_bf16(o[d + 1], a, vb + 2);
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < 2; i++) {
    float inverse = 1.0f / quad_sum(l[i]);
    if (g + 8 * i >= heads) continue;
    bf16 *to = out + (r * NH + h0 + g + 8 * i) * HS + warp * COLS;
#pragma unroll
    for (int d = 0; d < COLS / 8; d++) store_pair(to + d * 8 + 2 * t4, o[d][2 * i] * inverse, o[d][2 * i + 1] * inverse);
  }
}

/*
Attention for any head size and type, without tensor cores: a warp takes one query. 32 keys at a time, a lane computes the score of
one; then the lanes share the columns of the head. Training and decoding both call this function; fused operations are spelled out,
so that it is the same function in both. Shared memory of a warp: q, then sums (HS each), then 32 probabilities.
*/
__device__ inline float attend(float *shared, const floatX *query, const floatX *k, const floatX *v, size_t stride, int n, int HS) {
  int lane = threadIdx.x % WARP;
  float *q = shared, *sums = q + HS, *p = sums + HS, scale = 1.0f / sqrtf((float)HS), top = -INFINITY, total = 0;
  for (int i = lane; i < HS; i += WARP) {
    q[i] = to_float(query[i]);
    sums[i] = 0;
  }
  __syncwarp();
  for (int j0 = 0; j0 < n; j0 += WARP) {
    int m = min(n - j0, (int)WARP);
    float score = -INFINITY;
    if (lane < m) {
      const floatX *kj = k + (size_t)(j0 + lane) * stride;
      score = 0;
      for (int i = 0; i < HS; i++) score = fmaf(q[i], to_float(kj[i]), score);
      score = __fmul_rn(score, scale);
    }
    float new_top = fmaxf(top, warp_max(score)), shrink = j0 == 0 ? 0.0f : expf(top - new_top);
    top = new_top;
    p[lane] = lane < m ? expf(score - top) : 0.0f;
    total = fmaf(total, shrink, warp_sum(p[lane]));
    __syncwarp();
    for (int i = lane; i < HS; i += WARP) {
      float sum = sums[i] * shrink;
      for (int j = 0; j < m; j++) sum = fmaf(p[j], to_float(v[(size_t)(j0 + j) * stride + i]), sum);
      sums[i] = sum;
    }
    __syncwarp();
  }
  for (int i = lane; i < HS; i += WARP) sums[i] *= 1.0f / total;
  return top + logf(total);
}

__global__ void attention_forward_kernel(floatX *out, float *lse, const floatX *qkv, const int *start, size_t n, int T, int NH,
                                         int NKV, int HS) {
  SHARED_DYNAMIC(float, shared);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  size_t item = (size_t)blockIdx.x * ATT_WARPS + warp, QKV = (size_t)(NH + 2 * NKV) * HS, bt = item / NH;
  if (item >= n) return;
  int h = (int)(item % NH), t = (int)(bt % T), s = start[bt];
  float *mine = shared + warp * (2 * HS + WARP);
  const floatX *k = qkv + (bt - t + s) * QKV + (size_t)(NH + h / (NH / NKV)) * HS;
  float log_sum = attend(mine, qkv + bt * QKV + (size_t)h * HS, k, k + (size_t)NKV * HS, QKV, t - s + 1, HS);
  for (int i = lane; i < HS; i += WARP) from_float(&out[item * HS + i], mine[HS + i]);
  if (lane == 0) lse[item] = log_sum;
}

__global__ void attention_cached_kernel(floatX *out, const floatX *kcache, const floatX *vcache, const floatX *qkv, const int *seq,
                                        const int *pos,
                                        size_t n, int capacity, int NH, int NKV, int HS) {
  SHARED_DYNAMIC(float, shared);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  size_t item = (size_t)blockIdx.x * ATT_WARPS + warp, r = item / NH, width = (size_t)NKV * HS;
  if (item >= n) return;
  int h = (int)(item % NH);
  float *mine = shared + warp * (2 * HS + WARP);
  size_t first = (size_t)seq[r] * capacity * width + (size_t)(h / (NH / NKV)) * HS;
  attend(mine, qkv + r * (NH + 2 * NKV) * HS + (size_t)h * HS, kcache + first, vcache + first, width, pos[r] + 1, HS);
  for (int i = lane; i < HS; i += WARP) from_float(&out[item * HS + i], mine[HS + i]);
}

// dq of one query: a lane computes ds of one key, then the lanes share the columns.
__global__ void attention_backward_q_kernel(floatX *dqkv, const floatX *dout, const floatX *qkv, const float *lse, const int *start,
                                            size_t n, int T, int NH, int NKV, int HS) {
  SHARED_DYNAMIC(float, shared);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  size_t item = (size_t)blockIdx.x * ATT_WARPS + warp, QKV = (size_t)(NH + 2 * NKV) * HS, bt = item / NH;
  if (item >= n) return;
  int h = (int)(item % NH), t = (int)(bt % T);
  float *dq = shared + warp * (HS + WARP), *ds = dq + HS, scale = 1.0f / sqrtf((float)HS);
  floatX *slot = dqkv + bt * QKV + (size_t)h * HS;
  const floatX *q = qkv + bt * QKV + (size_t)h * HS, *dO = dout + item * HS;
  const floatX *k = qkv + (bt - t) * QKV + (size_t)(NH + h / (NH / NKV)) * HS;
  float D = dot_of(slot), log_sum = lse[item];
  for (int i = lane; i < HS; i += WARP) dq[i] = 0;
  for (int j0 = start[bt]; j0 <= t; j0 += WARP) {
    int j = j0 + lane;
    float s = 0, dp = 0;
    for (int i = 0; j <= t && i < HS; i++) {
      s += to_float(q[i]) * to_float(k[j * QKV + i]);
      dp += to_float(dO[i]) * to_float(k[j * QKV + (size_t)NKV * HS + i]);
    }
    ds[lane] = j <= t ? expf(s * scale - log_sum) * (dp - D) * scale : 0.0f;
    __syncwarp();
    for (int i = lane; i < HS; i += WARP) {
      for (int jj = 0; jj < WARP && j0 + jj <= t; jj++) dq[i] += ds[jj] * to_float(k[(j0 + jj) * QKV + i]);
    }
    __syncwarp();
  }
  for (int i = lane; i < HS; i += WARP) from_float(&slot[i], dq[i]);
}

// dk and dv of one key: the same with the parts exchanged, over all query heads that share the key.
__global__ void attention_backward_kv_kernel(floatX *dqkv, const floatX *dout, const floatX *qkv, const float *lse, const int *start,
                                             size_t n, int T, int NH, int NKV, int HS) {
  SHARED_DYNAMIC(float, shared);
  int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  size_t item = (size_t)blockIdx.x * ATT_WARPS + warp, QKV = (size_t)(NH + 2 * NKV) * HS;
  size_t bj = item / NKV, k_col = (NH + item % NKV) * HS;
  if (item >= n) return;
  int kvh = (int)(item % NKV), group = NH / NKV, j = (int)(bj % T);
  float *dk = shared + warp * (2 * HS + 2 * WARP), *dv = dk + HS, *ds = dv + HS, *p = ds + WARP, scale = 1.0f / sqrtf((float)HS);
  const floatX *k = qkv + bj * QKV + k_col, *v = k + (size_t)NKV * HS;
  for (int i = lane; i < HS; i += WARP) dk[i] = dv[i] = 0;
  for (int h = kvh * group; h < (kvh + 1) * group; h++) {
    for (int t0 = j; t0 < T; t0 += WARP) {
      size_t bt = bj - j + t0 + lane;
      bool seen = t0 + lane < T && start[bt] <= j;
      float s = 0, dp = 0;
      for (int i = 0; seen && i < HS; i++) {
        s += to_float(qkv[bt * QKV + (size_t)h * HS + i]) * to_float(k[i]);
        dp += to_float(dout[(bt * NH + h) * HS + i]) * to_float(v[i]);
      }
      p[lane] = seen ? expf(s * scale - lse[bt * NH + h]) : 0.0f;
      ds[lane] = seen ? p[lane] * (dp - dot_of(dqkv + bt * QKV + (size_t)h * HS)) * scale : 0.0f;
      __syncwarp();
      for (int i = lane; i < HS; i += WARP) {
        for (int tt = 0; tt < WARP && t0 + tt < T; tt++) {
          size_t row = bj - j + t0 + tt;
          dv[i] += p[tt] * to_float(dout[(row * NH + h) * HS + i]);
          dk[i] += ds[tt] * to_float(qkv[row * QKV + (size_t)h * HS + i]);
        }
      }
      __syncwarp();
    }
  }
  for (int i = lane; i < HS; i += WARP) {
    from_float(&dqkv[bj * QKV + k_col + i], dk[i]);
    from_float(&dqkv[bj * QKV + k_col + (size_t)NKV * HS + i], dv[i]);
  }
}

// Tensor cores serve bf16 heads of 64 and 128 (0: they do not).
static int flash_head(int HS) {
  return sizeof(floatX) == sizeof(bf16) && (HS == 64 || HS == 128) ? HS : 0;
}

template <int HS>
static void flash_forward(bf16 *out, float *lse, const bf16 *qkv, const int *start, int B, int T, int NH, int NKV) {
  size_t shared = (size_t)5 * ATT_TILE * (HS + 8) * sizeof(bf16);
  allow_shared(flash_forward_kernel<HS>, shared);
  LAUNCH(flash_forward_kernel<HS>, dim3(blocks_for((size_t)T, ATT_TILE), (unsigned)NH, (unsigned)B), ATT_THREADS, shared, out, lse,
         qkv, start, T, NH, NKV);
}

void attention_forward(floatX *out, float *lse, const floatX *qkv, const int *start, int B, int T, int NH, int NKV, int HS,
                       int precision) {
  (void)precision;   // of this program: floatX decides
  if (flash_head(HS) == 64) return flash_forward<64>((bf16 *)out, lse, (const bf16 *)qkv, start, B, T, NH, NKV);
  if (flash_head(HS) == 128) return flash_forward<128>((bf16 *)out, lse, (const bf16 *)qkv, start, B, T, NH, NKV);
  size_t n = (size_t)B * T * NH, shared = (size_t)ATT_WARPS * (2 * HS + WARP) * sizeof(float);
  allow_shared(attention_forward_kernel, shared);
  LAUNCH(attention_forward_kernel, blocks_for(n, ATT_WARPS), ATT_THREADS, shared, out, lse, qkv, start, n, T, NH, NKV, HS);
}

template <int HS>
static void flash_backward(bf16 *dqkv, const bf16 *dout, const float *lse, const bf16 *qkv, const int *start, int B, int T, int NH,
                           int NKV) {
  size_t shared = (size_t)(2 * ATT_TILE + 2 * ATT_HALF) * (HS + 8) * sizeof(bf16);
  unsigned tiles = blocks_for((size_t)T, ATT_TILE);
  allow_shared(flash_backward_kv_kernel<HS>, shared);
  allow_shared(flash_backward_q_kernel<HS>, shared);
  LAUNCH(flash_backward_kv_kernel<HS>, dim3(tiles, (unsigned)NKV, (unsigned)B), ATT_THREADS, shared, dqkv, dout, qkv, lse, start,
         T, NH, NKV);
  LAUNCH(flash_backward_q_kernel<HS>, dim3(tiles, (unsigned)NH, (unsigned)B), ATT_THREADS, shared, dqkv, dout, qkv, lse, start, T,
         NH, NKV);
}

void attention_backward(floatX *dqkv, const floatX *dout, const floatX *out, const float *lse, const floatX *qkv, const int *start,
                        int B, int T, int NH, int NKV, int HS, int precision) {
  (void)precision;
  size_t queries = (size_t)B * T * NH, keys = (size_t)B * T * NKV;
  LAUNCH(attention_dots_kernel<floatX>, blocks_for(queries, ATT_WARPS), ATT_THREADS, 0, dqkv, dout, out, queries, NH, NKV, HS);
  if (flash_head(HS) == 64) return flash_backward<64>((bf16 *)dqkv, (const bf16 *)dout, lse, (const bf16 *)qkv, start, B, T, NH, NKV);
  if (flash_head(HS) == 128) return flash_backward<128>((bf16 *)dqkv, (const bf16 *)dout, lse, (const bf16 *)qkv, start, B, T, NH,
                                                        NKV);
  size_t shared = (size_t)ATT_WARPS * (2 * HS + 2 * WARP) * sizeof(float);
  allow_shared(attention_backward_kv_kernel, shared);
  allow_shared(attention_backward_q_kernel, shared);
  LAUNCH(attention_backward_kv_kernel, blocks_for(keys, ATT_WARPS), ATT_THREADS, shared, dqkv, dout, qkv, lse, start, keys, T, NH,
         NKV, HS);
  LAUNCH(attention_backward_q_kernel, blocks_for(queries, ATT_WARPS), ATT_THREADS, shared, dqkv, dout, qkv, lse, start, queries, T,
         NH, NKV, HS);
}

// k and v of each row go to their places in the caches.
template <int W>
__global__ void cache_store_kernel(floatX *kcache, floatX *vcache, const floatX *qkv, const int *seq, const int *pos, int capacity,
                                   int NH, int NKV, int HS) {
  size_t r = blockIdx.x, width = (size_t)NKV * HS, at = ((size_t)seq[r] * capacity + pos[r]) * width;
  const floatX *k = qkv + r * (NH + 2 * NKV) * HS + (size_t)NH * HS;
  for (size_t i = threadIdx.x * W; i < width; i += blockDim.x * W) {
    float v[W];
    load<W>(v, k + i);
    store<W>(kcache + at + i, v);
    load<W>(v, k + width + i);
    store<W>(vcache + at + i, v);
  }
}

template <int HS>
static void flash_cached(bf16 *out, const bf16 *kcache, const bf16 *vcache, const bf16 *qkv, const int *seq, const int *pos, int R,
                         int capacity, int NH, int NKV) {
  size_t shared = (size_t)(4 * ATT_TILE + 16) * (HS + 8) * sizeof(bf16);
  unsigned blocks = (unsigned)NKV * blocks_for((size_t)(NH / NKV), 16);
  allow_shared(flash_cached_kernel<HS>, shared);
  LAUNCH(flash_cached_kernel<HS>, dim3((unsigned)R, blocks), ATT_THREADS, shared, out, kcache, vcache, qkv, seq, pos, capacity, NH,
         NKV);
}

size_t attention_scratch_bytes(int, int) {
  return 0;
}

size_t kv_cache_bytes(int capacity, int NKV, int HS, int) {
  return (size_t)capacity * NKV * HS * sizeof(floatX);
}

void attention_cached(floatX *out, void *kcache, void *vcache, const floatX *qkv, const int *seq, const int *pos,
                      int R, int capacity, int NH, int NKV, int HS, int precision) {
  int width = width_of((size_t)HS);
  floatX *keys = (floatX *)kcache, *values = (floatX *)vcache;
  (void)precision;
  LAUNCH_WIDTH(width, cache_store_kernel, (unsigned)R, row_threads(NKV * HS, width), 0, keys, values, qkv, seq, pos, capacity, NH,
               NKV, HS);
  bf16 *o = (bf16 *)out;
  const bf16 *kc = (const bf16 *)kcache, *vc = (const bf16 *)vcache, *x = (const bf16 *)qkv;
  if (flash_head(HS) == 64) return flash_cached<64>(o, kc, vc, x, seq, pos, R, capacity, NH, NKV);
  if (flash_head(HS) == 128) return flash_cached<128>(o, kc, vc, x, seq, pos, R, capacity, NH, NKV);
  size_t n = (size_t)R * NH, shared = (size_t)ATT_WARPS * (2 * HS + WARP) * sizeof(float);
  allow_shared(attention_cached_kernel, shared);
  LAUNCH(attention_cached_kernel, blocks_for(n, ATT_WARPS), ATT_THREADS, shared, out, keys, values, qkv, seq, pos, n, capacity,
         NH, NKV, HS);
}

#endif
