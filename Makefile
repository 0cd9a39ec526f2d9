# bitnet.c. `make` builds the CPU program; `make help` lists everything.
#
#   CC=clang         another compiler                MARCH=            code for any CPU of this kind, not just for this one
#   OPENMP=0         one thread, no OpenMP needed    WERROR=1          warnings are errors (what CI uses)

CC      = gcc
CXX     = g++
MARCH   = -march=native -mprefer-vector-width=512
# -Wno-pass-failed: clang reports loops marked simd that it decides not to vectorise.
WARN    = -Wall -Wextra -Wno-pass-failed $(if $(WERROR),-Werror)
COMMIT := $(shell git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown)

ifeq ($(filter x86_64 i686 amd64,$(shell $(CC) -dumpmachine | cut -d- -f1)),)
MARCH   = -mcpu=native
endif

# OpenMP where the compiler has it; without it the program is the same, on one thread.
OPENMP := $(shell t=$$(mktemp); echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c -o $$t - 2>/dev/null && echo 1 || echo 0; rm -f $$t)
ifeq ($(OPENMP),1)
OMP     = -fopenmp
else
OMP     = -fopenmp-simd -Wno-unknown-pragmas
endif

# -fno-math-errno: sqrtf need not set errno, so loops with a root in them become vector code. Roots themselves are rounded as before.
OPTIMIZE = -O3 -fno-math-errno
CFLAGS  = $(OPTIMIZE) $(MARCH) -std=gnu11 $(WARN)
BUILD   = $(CC) $(CFLAGS) $(OMP) -DBITNET_COMMIT='"$(COMMIT)"'
# gcc's sanitizers see a null format string where there is none; hence the last flag.
SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -Wno-format-truncation
HEADERS = $(wildcard *.h bitnet/*.h modes/*.h)
TESTS   = test_bitnet.c $(wildcard dev/test/*.h) train_bitnet.c $(HEADERS)

.PHONY: all test asan fuzzing headers testisa testarm clean help

all: train_bitnet

train_bitnet: train_bitnet.c $(HEADERS)
	@$(if $(filter 0,$(OPENMP)),echo "note: $(CC) has no OpenMP here; building for one thread")
	$(BUILD) -o $@ train_bitnet.c -lm

test_bitnet: $(TESTS)
	$(BUILD) -o $@ test_bitnet.c -lm

test_float64: dev/test/test_float64.c train_bitnet.c $(HEADERS) dev/test/check.h
	$(BUILD) -o $@ dev/test/test_float64.c -lm

test: train_bitnet test_bitnet test_float64
	./test_float64
	./test_bitnet

# The same tests under AddressSanitizer and UndefinedBehaviorSanitizer.
train_bitnet_asan: train_bitnet.c $(HEADERS)
	$(BUILD) $(SANITIZE) -o $@ train_bitnet.c -lm

test_bitnet_asan: $(TESTS)
	$(BUILD) $(SANITIZE) -o $@ test_bitnet.c -lm

asan: train_bitnet_asan test_bitnet_asan
	BITNET_BINARY=./train_bitnet_asan ./test_bitnet_asan

# Broken model files against the readers, in both builds: FUZZ_SECONDS each for three formats.
FUZZ_SECONDS = 30
fuzz: dev/test/fuzz.c dev/test/check.h train_bitnet.c $(HEADERS)
	$(BUILD) -o $@ dev/test/fuzz.c -lm

fuzz_asan: dev/test/fuzz.c dev/test/check.h train_bitnet.c $(HEADERS)
	$(BUILD) $(SANITIZE) -o $@ dev/test/fuzz.c -lm

fuzzing: fuzz fuzz_asan
	for f in gguf safetensors llama2c; do ./fuzz $$f $(FUZZ_SECONDS) && ./fuzz_asan $$f $(FUZZ_SECONDS) 2 || exit 1; done

# Every shared header alone, as C11 and as C++17: the CUDA program includes them.
headers:
	@for h in $(filter-out modes/modes.h,$(HEADERS)); do \
	  echo "#include \"$$h\"" | $(CC) -std=gnu11 $(WARN) -Wno-unknown-pragmas -I. -x c -fsyntax-only - || exit 1; \
	  case $$h in matmul.h|matmul_i8.h) ;; *) echo "#include \"$$h\"" | $(CXX) -std=gnu++17 $(WARN) -Wno-unknown-pragmas -I. -x c++ -fsyntax-only - || exit 1;; esac; \
	done; echo "headers compile as C and as C++"

# ---------------------------------------------------------------------------------------------------------
# CUDA. `make train_bitnetcu` builds the GPU program; the emulated tests need no GPU, no nvcc and no CUDA headers.
#
#   ARCH=sm_90       the GPU to build for; without it: the one in this machine, or sm_80 and newer where there is none
#   NVCC=            the compiler                    CUBLAS=DIR        a directory with include/cublasLt.h and lib/
#   FP32=1           fp32 activations, for exact comparisons: precision=fp32 needs it

NVCC   ?= $(or $(shell command -v nvcc),$(lastword $(wildcard /usr/local/cuda*/bin/nvcc)))
PYTHON ?= python3
ARCH   ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo native || echo sm_80)

# cuBLASLt comes with the CUDA Toolkit, with a distribution's package, or from PyPI: pip install nvidia-cublas (CUDA 13),
# nvidia-cublas-cu12 (CUDA 12). The first directory that has the header wins.
CUBLAS_DIRS = $(CUBLAS) $(CUDA_HOME) $(patsubst %/bin/nvcc,%,$(NVCC)) /usr/local/cuda $(wildcard /usr/local/cuda-*) /usr \
              $(foreach d,cu13 cublas,$(wildcard $(shell $(PYTHON) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])' 2>/dev/null)/nvidia/$(d)))
CUBLAS_ROOT = $(patsubst %/include/cublasLt.h,%,$(firstword $(wildcard $(addsuffix /include/cublasLt.h,$(CUBLAS_DIRS)))))
CUBLAS_SO   = $(firstword $(wildcard $(foreach d,lib64 lib lib/x86_64-linux-gnu lib/aarch64-linux-gnu,\
              $(CUBLAS_ROOT)/$(d)/libcublasLt.so $(CUBLAS_ROOT)/$(d)/libcublasLt.so.1?)))

CUDA_FLAGS = $(if $(FP32),-DBITNET_FLOATX_F32) -std=c++17 -O3 -arch=$(ARCH) -I. -I$(CUBLAS_ROOT)/include -DBITNET_COMMIT='"$(COMMIT)"' \
             $(if $(WERROR),-Werror all-warnings) -Xcompiler -Wall$(comma)-Wextra$(if $(WERROR),$(comma)-Werror)
CUDA_LIBS  = -Xlinker $(CUBLAS_SO) -Xlinker -rpath$(comma)$(dir $(CUBLAS_SO))
CUDA_SOURCE = train_bitnet.cu $(wildcard *.cuh) $(HEADERS)
comma      = ,

# One line that says what is missing; nothing if all is there.
CUDA_MISSING = $(if $(NVCC),$(if $(CUBLAS_SO),,cuBLASLt not found: pip install nvidia-cublas, or CUBLAS=DIR with include/ and lib/),\
               nvcc not found: install the CUDA Toolkit 12 or 13, or say NVCC=/path/to/nvcc; the CPU program is make train_bitnet)

define NVCC_BUILD
	@$(if $(strip $(CUDA_MISSING)),echo '$(strip $(CUDA_MISSING))' >&2; exit 1,echo '$@: $(NVCC) -arch=$(ARCH) $(CUBLAS_SO)')
	$(NVCC) $(CUDA_FLAGS)
endef

.PHONY: testcu testemu benchcu compilecu

train_bitnetcu: $(CUDA_SOURCE)
	$(NVCC_BUILD) -o $@ train_bitnet.cu $(CUDA_LIBS)

# The CPU ops as an object, for the comparison of both.
cpu_ops.o: train_bitnet.c $(HEADERS)
	$(BUILD) -DTESTING -c -o $@ train_bitnet.c

test_cuda_bf16 test_cuda_f32: test_cuda_%: dev/test/test_cuda.cu dev/test/check.h dev/cuda/memory.cuh cpu_ops.o $(CUDA_SOURCE)
	$(NVCC_BUILD) $(if $(filter f32,$*),-DBITNET_FLOATX_F32) -Xcompiler -fopenmp -o $@ dev/test/test_cuda.cu cpu_ops.o $(CUDA_LIBS)

test_bitnetcu: $(TESTS) $(CUDA_SOURCE)
	$(NVCC_BUILD) -DBITNET_FLOATX_F32 -x cu -o $@ test_bitnet.c $(CUDA_LIBS)

# On a GPU: every op against the CPU in both builds, then the whole table in fp32.
testcu: train_bitnetcu test_cuda_bf16 test_cuda_f32 test_bitnetcu
	./test_cuda_f32
	./test_cuda_bf16
	./test_bitnetcu

# The main kernels in numbered versions, each checked against plain loops; on a GPU also time and share of its peak.
KERNELS    = rmsnorm_quant ternary_product attention_forward
BENCH_CUDA = $(addprefix bench_cuda_,$(KERNELS))

$(BENCH_CUDA): bench_cuda_%: dev/cuda/%.cu $(wildcard dev/cuda/*.cuh) $(CUDA_SOURCE)
	$(NVCC_BUILD) -o $@ $< $(CUDA_LIBS)

benchcu: $(BENCH_CUDA)
	for k in $(BENCH_CUDA); do ./$$k || exit 1; done

# Compile and link for both generations, no GPU needed.
COMPILED_CUDA = train_bitnetcu test_cuda_bf16 test_cuda_f32 test_bitnetcu $(BENCH_CUDA)

compilecu:
	$(MAKE) -B ARCH=sm_80 WERROR=1 $(COMPILED_CUDA)
	$(MAKE) -B ARCH=sm_90 WERROR=1 $(COMPILED_CUDA)

# ---------------------------------------------------------------------------------------------------------
# The same under dev/cuda_emu.h. No contraction to fused multiply-adds, and no type-based aliasing: kernels read memory as wide words.

EMU_BUILD = $(CXX) -x c++ -std=c++17 -O2 -g $(WARN) -Wno-unknown-pragmas -fno-strict-aliasing -ffp-contract=off -I. -include dev/cuda_emu.h
EMU_ASAN  = -O1 -fsanitize=address,undefined -fno-sanitize-recover=undefined
EMU_FLOATX = $(if $(findstring f32,$@),-DBITNET_FLOATX_F32)
EMU_TESTS = emu_ops_bf16 emu_ops_f32 emu_asan_bf16 emu_asan_f32

$(EMU_TESTS): dev/test/test_cuda.cu dev/test/check.h dev/cuda/memory.cuh dev/cuda_emu.h cpu_ops.o $(CUDA_SOURCE)
	$(EMU_BUILD) $(EMU_FLOATX) $(if $(findstring asan,$@),$(EMU_ASAN)) -o $@ dev/test/test_cuda.cu -x none cpu_ops.o $(OMP) -lm

emu_bitnet_f32 emu_bitnet_bf16: $(TESTS) dev/cuda_emu.h $(CUDA_SOURCE)
	$(EMU_BUILD) $(EMU_FLOATX) -o $@ test_bitnet.c -lm

emu_train_f32: dev/cuda_emu.h $(CUDA_SOURCE)
	$(EMU_BUILD) -DBITNET_FLOATX_F32 -o $@ train_bitnet.cu -lm

EMU_CUDA = $(addprefix emu_cuda_,$(KERNELS))

$(EMU_CUDA): emu_cuda_%: dev/cuda/%.cu $(wildcard dev/cuda/*.cuh) dev/cuda_emu.h $(CUDA_SOURCE)
	$(EMU_BUILD) -o $@ $< -lm

# The whole table holds for fp32 activations; of the equalities of inference, which hold in any format, bf16 runs these.
EMU_BF16_TABLE = packed_weights packed_codes packed_threads screen frozen

# EMU_JOBS parts are built and run at a time, the long ones first; each part's output stays together.
EMU_JOBS = 2
EMU_PARTS = testemu_table_1 testemu_table_2 testemu_table_3 testemu_curve $(addprefix test,$(EMU_TESTS) $(EMU_CUDA)) testemu_table_bf16
.PHONY: $(EMU_PARTS)

testemu:
	$(MAKE) -j$(EMU_JOBS) --output-sync=target $(EMU_PARTS)

testemu_table_1 testemu_table_2 testemu_table_3: testemu_table_%: emu_bitnet_f32 emu_train_f32
	BITNET_BINARY=./emu_train_f32 ./emu_bitnet_f32 $*/3

testemu_curve: emu_train_f32 train_bitnet
	dev/test/same_curve.sh ./train_bitnet ./emu_train_f32

$(addprefix test,$(EMU_TESTS) $(EMU_CUDA)): test%: %
	for order in 0 1; do echo "$*, order $$order"; EMU_ORDER=$$order ./$* || exit 1; done

testemu_table_bf16: emu_bitnet_bf16 emu_train_f32
	for t in $(EMU_BF16_TABLE); do BITNET_BINARY=./emu_train_f32 ./emu_bitnet_bf16 $$t || exit 1; done

# ---------------------------------------------------------------------------------------------------------
# Other instruction sets: the kernels of each that this CPU can run, and aarch64 through qemu's user emulation.

KERNEL_TABLE = gemm_i8 gemm_float block_product packed_twin packed_sums screen dx_int8 threads

ISA_avx2      = -mavx2 -mfma
ISA_avxvnni   = -mavx2 -mfma -mavxvnni
ISA_avx512    = -march=skylake-avx512
ISA_vnni      = -march=icelake-server
ISA_bf16      = -march=cooperlake
# What /proc/cpuinfo calls it, newest first in each line of descent; the build for `make test` is the native one.
ISA_FLAGS     = avx2:fma avxvnni:avx_vnni avx512:avx512bw vnni:avx512_vnni bf16:avx512_bf16
ISAS          = $(foreach f,$(ISA_FLAGS),$(if $(shell grep -cw $(lastword $(subst :, ,$(f))) /proc/cpuinfo | grep -v '^0'),$(firstword $(subst :, ,$(f)))))

test_bitnet_isa_%: $(TESTS)
	$(CC) $(OPTIMIZE) $(ISA_$*) -std=gnu11 $(WARN) $(OMP) -o $@ test_bitnet.c -lm

testisa: $(addprefix test_bitnet_isa_,$(ISAS))
	@$(if $(ISAS),,echo 'this CPU has none of: $(ISA_FLAGS)' >&2; exit 1)
	for i in $(ISAS); do for t in $(KERNEL_TABLE); do ./test_bitnet_isa_$$i $$t || exit 1; done; done

# Emulation is 15 times slower than the machine, so it runs what depends on the machine: kernels, ops, whole models, one program.
# ARM_TABLE= runs all of the table, of which only tests that bound a time fail. armv8-a has no dot products and no bf16.
ARM_CC    = aarch64-linux-gnu-gcc
ARM_ROOT  = /usr/aarch64-linux-gnu
ARM_QEMU  = $(firstword $(foreach q,qemu-aarch64-static qemu-aarch64,$(shell command -v $(q))))
ARM_RUN   = $(ARM_QEMU) -cpu max -L $(ARM_ROOT)
ARM_TABLE = exp_fast gemm_ dx_int8 block_product quant_ attention packed_ screen_bounds rows_alone threads_ops generate ref_ run_same_bits
ARM_MISSING = $(if $(shell command -v $(ARM_CC)),$(if $(ARM_QEMU),,no qemu-aarch64: apt-get install qemu-user-static),\
              no $(ARM_CC): apt-get install gcc-aarch64-linux-gnu libc6-dev-arm64-cross)

define ARM_BUILD
	@$(if $(strip $(ARM_MISSING)),echo '$(strip $(ARM_MISSING))' >&2; exit 1)
	$(ARM_CC) $(OPTIMIZE) -std=gnu11 $(WARN) -fopenmp
endef

train_bitnet_arm: train_bitnet.c $(HEADERS)
	$(ARM_BUILD) -march=armv8.6-a -DBITNET_COMMIT='"$(COMMIT)"' -o $@ train_bitnet.c -lm

test_bitnet_arm_v8 test_bitnet_arm_v86: test_bitnet_arm_%: $(TESTS)
	$(ARM_BUILD) -march=$(if $(filter v8,$*),armv8-a,armv8.6-a) -o $@ test_bitnet.c -lm

testarm: train_bitnet_arm test_bitnet_arm_v86 test_bitnet_arm_v8
	for t in $(or $(ARM_TABLE),''); do BITNET_BINARY="$(ARM_RUN) ./train_bitnet_arm" $(ARM_RUN) ./test_bitnet_arm_v86 $$t || exit 1; done
	for t in gemm_i8 packed_twin screen_bounds; do $(ARM_RUN) ./test_bitnet_arm_v8 $$t || exit 1; done

# ---------------------------------------------------------------------------------------------------------
clean:
	rm -f train_bitnet test_bitnet test_float64 fuzz fuzz_asan train_bitnet_asan test_bitnet_asan train_bitnetcu test_bitnetcu \
	  test_cuda_bf16 test_cuda_f32 cpu_ops.o $(BENCH_CUDA) $(EMU_CUDA) $(EMU_TESTS) emu_bitnet_f32 emu_bitnet_bf16 emu_train_f32 \
	  test_bitnet_isa_* train_bitnet_arm test_bitnet_arm_*

help:
	@echo "make train_bitnet   the program (CPU)"
	@echo "make test           all tests; needs nothing but the compiler"
	@echo "make asan           the tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make fuzzing        broken model files against the readers, FUZZ_SECONDS=30 for each format"
	@echo "make headers        check that the shared headers compile as C11 and C++17"
	@echo "make train_bitnetcu the program for the GPU (ARCH=sm_90 NVCC= CUBLAS=)"
	@echo "make testcu         all tests on the GPU"
	@echo "make benchcu        the main kernels in numbered versions, timed on the GPU"
	@echo "make testemu        the tests of the CUDA code on the CPU, without a GPU or CUDA"
	@echo "make compilecu      compile and link the CUDA code for sm_80 and sm_90"
	@echo "make testisa        the kernels of every x86 instruction set that this CPU has"
	@echo "make testarm        the tests on aarch64, cross-compiled and emulated (ARM_TABLE= for all of them)"
	@echo "make clean          remove what was built"
	@echo "variables: CC=clang MARCH= OPENMP=0 WERROR=1"
