# bitnet.c. `make` builds the CPU program; `make help` lists everything.
#
#   CC=clang         another compiler                MARCH=            code for any CPU of this kind, not just for this one
#   OPENMP=0         one thread, no OpenMP needed    WERROR=1          warnings are errors (what CI uses)

CC      = gcc
CXX     = g++
MARCH   = -march=native
# -Wno-pass-failed: clang reports loops marked simd that it decides not to vectorise.
WARN    = -Wall -Wextra -Wno-pass-failed $(if $(WERROR),-Werror)
COMMIT := $(shell git describe --always --dirty --abbrev=40 --exclude '*' 2>/dev/null || echo unknown)

ifeq ($(filter x86_64 i686 amd64,$(shell $(CC) -dumpmachine | cut -d- -f1)),)
MARCH   = -mcpu=native
endif

# OpenMP where the compiler has it; without it the program is the same, on one thread.
OPENMP := $(shell echo 'int main(void){return 0;}' | $(CC) -fopenmp -x c -o /dev/null - 2>/dev/null && echo 1 || echo 0)
ifeq ($(OPENMP),1)
OMP     = -fopenmp
else
OMP     = -Wno-unknown-pragmas
endif

CFLAGS  = -O3 $(MARCH) -std=gnu11 $(WARN)
BUILD   = $(CC) $(CFLAGS) $(OMP) -DBITNET_COMMIT='"$(COMMIT)"'
# gcc's sanitizers see a null format string where there is none; hence the last flag.
SANITIZE = -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -Wno-format-truncation
HEADERS = $(wildcard *.h bitnet/*.h modes/*.h)
TESTS   = test_bitnet.c $(wildcard dev/test/*.h) train_bitnet.c $(HEADERS)

.PHONY: all test asan headers bench clean help

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

# Every shared header alone, as C11 and as C++17: the CUDA program includes them.
headers:
	@for h in $(filter-out modes/modes.h,$(HEADERS)); do \
	  echo "#include \"$$h\"" | $(CC) -std=gnu11 $(WARN) -Wno-unknown-pragmas -I. -x c -fsyntax-only - || exit 1; \
	  case $$h in matmul.h) ;; *) echo "#include \"$$h\"" | $(CXX) -std=gnu++17 $(WARN) -Wno-unknown-pragmas -I. -x c++ -fsyntax-only - || exit 1;; esac; \
	done; echo "headers compile as C and as C++"

clean:
	rm -f train_bitnet test_bitnet test_float64 train_bitnet_asan test_bitnet_asan

help:
	@echo "make train_bitnet   the program (CPU)"
	@echo "make test           all tests; needs nothing but the compiler"
	@echo "make asan           the tests under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make headers        check that the shared headers compile as C11 and C++17"
	@echo "make clean          remove what was built"
	@echo "variables: CC=clang MARCH= OPENMP=0 WERROR=1"
