/*
threads.h: how many threads compute on the CPU, and how they wait for each other.

What it is:  the number of OpenMP's threads, chosen for the machine or the container that the program runs in, and asked for by every
             loop that hands out room to threads; whether a thread that waits spins or sleeps. Without OpenMP everything here says 1.
What not:    no loops over work and no locks: those are pragmas where the work is. No result depends on anything in this file.
Read before: nothing. matmul.h and train_bitnet.c use it.
Defines:     choose_threads, thread_count, threads_here, thread_index, wait_briefly.
*/
#ifndef BITNET_THREADS_H
#define BITNET_THREADS_H

#include "bitnet/utils.h"
#ifdef _OPENMP
#include <omp.h>
#endif

// ---------------------------------------------------------------------------------------------------------
// Their number.

// Threads of the next parallel region.
static int thread_count(void) {
#ifdef _OPENMP
  return omp_get_max_threads();
#else
  return 1;
#endif
}

// The number of threads inside a parallel region.
static int threads_here(void) {
#ifdef _OPENMP
  return omp_get_num_threads();
#else
  return 1;
#endif
}

// This thread's number among them, from 0.
static int thread_index(void) {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

// The CPUs that are the first hardware thread of their core; SMT siblings share the vector units and only add noise.
static int physical_cores(void) {
  int cores = 0, cpus = (int)sysconf(_SC_NPROCESSORS_ONLN);
  for (int cpu = 0; cpu < cpus; cpu++) {
    char path[128];
    int first = cpu;
    snprintf(path, sizeof path, "/sys/devices/system/cpu/cpu%d/topology/thread_siblings_list", cpu);
    FILE *f = fopen(path, "r");
    if (f) {
      if (fscanf(f, "%d", &first) != 1) first = cpu;
      fclose(f);
    }
    cores += first == cpu;
  }
  return cores > 0 ? cores : 1;
}

// The CPUs that a container may use, rounded up; 0 where nothing limits them.
static int container_cpus(void) {
  double quota = 0, period = 0;
  FILE *f = fopen("/sys/fs/cgroup/cpu.max", "r");
  if (f == NULL) return 0;
  int n = fscanf(f, "%lf %lf", &quota, &period);   // "max 100000" without a limit
  fclose(f);
  return n == 2 && period > 0 ? (int)ceil(quota / period) : 0;
}

// Sets the number of threads, 0 = one for each core that may be used, and returns it.
UNUSED static int choose_threads(int threads) {
#ifdef _OPENMP
  if (threads <= 0) {
    int cores = physical_cores(), allowed = omp_get_num_procs(), quota = container_cpus();
    threads = cores < allowed ? cores : allowed;
    if (quota > 0 && quota < threads) threads = quota;
    if (getenv("OMP_NUM_THREADS")) threads = omp_get_max_threads();
  }
  omp_set_num_threads(threads);
#else
  (void)physical_cores;
  (void)container_cpus;
  (void)threads;
#endif
  return thread_count();
}

// ---------------------------------------------------------------------------------------------------------
// How they wait.

// 1 if, at three moments, more threads of other programs wanted to run than this one leaves cores for; 0 if not, or if unknown.
UNUSED static int others_compute(void) {
  long cores = sysconf(_SC_NPROCESSORS_ONLN), threads = getenv("OMP_NUM_THREADS") ? atol(getenv("OMP_NUM_THREADS")) : cores;
  for (int moment = 0; moment < 3; moment++) {
    long running = 1;   // with this one
    FILE *f = fopen("/proc/loadavg", "r");
    int found = f && fscanf(f, "%*f %*f %*f %ld", &running) == 1;
    if (f) fclose(f);
    if (!found || running - 1 + threads <= cores) return 0;
    usleep(1000);
  }
  return 1;
}

/*
A thread that waits for the others may spin or sleep. Spinning is fast while every thread has a core, for waking a thread takes longer
than many an op. Beside other programs it takes the core from the very thread that it waits for, and a step of a small model takes
three times as long, ten times as OpenMP's runtime comes. So the program looks who else computes when it starts. The runtime reads its
settings before main begins; to change them the program starts itself once more.
*/
UNUSED static void wait_briefly(char **argv) {
#ifdef _OPENMP
  if (getenv("OMP_WAIT_POLICY") || getenv("GOMP_SPINCOUNT")) return;   // the user's choice, or ours the second time
  int brief = others_compute();
  setenv("GOMP_SPINCOUNT", brief ? "1000" : "10000", 1);   // turns of a loop: some 50 and 500 microseconds
  setenv("KMP_BLOCKTIME", brief ? "0" : "1", 0);           // the same for clang's runtime, in milliseconds
  execv("/proc/self/exe", argv);   // returns only if it fails; then the waits are long, nothing else
#endif
  (void)argv;
}

#endif
