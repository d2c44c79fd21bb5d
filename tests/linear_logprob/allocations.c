// Counts what a process has allocated, for test_linear_logprob_workspace.py: preloaded, it takes malloc's place and asks
// glibc's own for the memory, and notes what is mapped in large pieces (csrc/common/spare.cpp).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <malloc.h>
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

void* __libc_malloc(size_t);
void* __libc_calloc(size_t, size_t);
void* __libc_realloc(void*, size_t);
void* __libc_memalign(size_t, size_t);
void __libc_free(void*);

static long live, most;

static void count(long bytes) {
  const long now = __atomic_add_fetch(&live, bytes, __ATOMIC_RELAXED);
  long before = __atomic_load_n(&most, __ATOMIC_RELAXED);
  while (now > before && !__atomic_compare_exchange_n(&most, &before, now, 1, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
}

static void* taken(void* block) {
  count(block ? (long)malloc_usable_size(block) : 0);
  return block;
}

void* malloc(size_t size) { return taken(__libc_malloc(size)); }
void* calloc(size_t count, size_t size) { return taken(__libc_calloc(count, size)); }
void* memalign(size_t line, size_t size) { return taken(__libc_memalign(line, size)); }

// What C++ asks for scratch, by either name. Whoever has got a block waits a little: so all threads have theirs at once on
// any machine.
void* aligned_alloc(size_t line, size_t size) {
  void* block = taken(__libc_memalign(line, size));
  if (size > 1 << 16) usleep(2000);
  return block;
}

int posix_memalign(void** out, size_t line, size_t size) {
  void* block = aligned_alloc(line, size);
  if (block) *out = block;
  return block ? 0 : ENOMEM;
}

void free(void* block) {
  __atomic_sub_fetch(&live, block ? (long)malloc_usable_size(block) : 0, __ATOMIC_RELAXED);
  __libc_free(block);
}

void* realloc(void* block, size_t size) {
  __atomic_sub_fetch(&live, block ? (long)malloc_usable_size(block) : 0, __ATOMIC_RELAXED);
  return taken(__libc_realloc(block, size));
}

// Of the one thread that calls the ops. malloc does not come by here.
static struct { void* at; size_t size; } mapped[64];

void* mmap(void* at, size_t size, int protection, int flags, int file, off_t offset) {
  static void* (*next)(void*, size_t, int, int, int, off_t);
  if (!next) next = (void* (*)(void*, size_t, int, int, int, off_t))dlsym(RTLD_NEXT, "mmap");
  void* block = next(at, size, protection, flags, file, offset);
  if (block == MAP_FAILED || !(flags & MAP_ANONYMOUS) || size < 1 << 20) return block;
  for (int i = 0; i < 64; ++i) {
    if (mapped[i].at) continue;
    mapped[i].at = block;
    mapped[i].size = size;
    count((long)size);
    return block;
  }
  abort();
}

int munmap(void* at, size_t size) {
  static int (*next)(void*, size_t);
  if (!next) next = (int (*)(void*, size_t))dlsym(RTLD_NEXT, "munmap");
  for (int i = 0; i < 64; ++i) {
    if (mapped[i].at != at || mapped[i].size != size) continue;
    mapped[i].at = 0;
    count(-(long)size);
  }
  return next(at, size);
}

// Bytes allocated now; `most_allocated` is the most there were since then.
long mark_allocated(void) {
  const long now = __atomic_load_n(&live, __ATOMIC_RELAXED);
  __atomic_store_n(&most, now, __ATOMIC_RELAXED);
  return now;
}

long most_allocated(void) { return __atomic_load_n(&most, __ATOMIC_RELAXED); }
