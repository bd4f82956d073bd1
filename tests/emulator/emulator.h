// A CPU meaning for the device functions of csrc/cuda/device.h, so that kernels run where no GPU is. For tests only.
//
// A block's threads are fibers of one OS thread. They switch where the hardware lets threads wait for each other: at
// barriers and warp exchanges. Blocks run one after the other. What a GPU would do silently is an error here:
// - a barrier or warp exchange that not all of its threads reach at the same place in the source;
// - shared memory out of bounds, misaligned, read before it was written or while an asynchronous copy to it is under way,
//   and read or written without a barrier after another thread wrote or read it.
// Global memory is plain memory: build with -fsanitize=address,undefined to have its bounds and alignment checked.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace sk::gpu {

constexpr int kWarp = 32;

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

namespace emulator {

constexpr size_t kStack = 128 << 10;  // bytes of a thread's stack: its registers and local arrays

// Where a thread waits: what for, and the place in the source.
struct Site {
  const char *what, *file;
  int line;
  bool operator==(const Site& o) const { return line == o.line && !strcmp(what, o.what) && !strcmp(file, o.file); }
  std::string text() const { return std::string(what) + " at " + file + ":" + std::to_string(line); }
};

// One byte of shared memory. Times are counted in barriers of the block and of the warp.
struct Byte {
  struct Access {
    int32_t thread = -1, block_time = -1, warp_time = -1;
  };
  Access write, read;                 // the last ones
  int32_t other_read_warp_time = -1;  // of another thread of the last reader's warp, in the same interval
  bool read_by_warps = false;         // more than one, in the same interval
  bool written = false, in_flight = false;
};

struct Copy {
  uint32_t to;
  const void* from;
  int bytes, inside;  // the first `inside` are read, the others are zeros
};

struct Thread {
  ucontext_t context;
  jmp_buf jump;
  std::unique_ptr<char[]> stack{new char[kStack]};
  enum { kNew, kReady, kAtBarrier, kAtExchange, kDone } state;
  Site site;
  void* argument;                         // of the exchange
  std::vector<std::vector<Copy>> copies;  // groups, the oldest first; the last one is open
};

class Block {
 public:
  static constexpr int kMostShared = 227 << 10;  // bytes, of Hopper; 163 KB on Ampere

  // The running block and thread.
  static Block*& current() {
    static thread_local Block* block = nullptr;
    return block;
  }
  int thread() const { return running_; }
  Dim index, grid;
  int threads;

  // Runs kernel() for all threads of all blocks. Returns "", or what was wrong.
  std::string run(Dim grid_size, int thread_count, int64_t shared_bytes, const std::function<void()>& kernel) {
    Block* const outer = current();
    current() = this;
    grid = grid_size;
    threads = thread_count;
    kernel_ = &kernel;
    error_.clear();
    if (threads < 1 || threads > 1024) fail("a block must have 1 to 1024 threads, got %d", threads);
    if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535 || grid.x > 2147483647u)
      fail("the grid must be at most 2^31 - 1 x 65535 x 65535 and not empty, got %u x %u x %u", grid.x, grid.y, grid.z);
    if (shared_bytes > kMostShared)
      fail("a block has at most %d bytes of shared memory, got %ld", kMostShared, long(shared_bytes));
    threads_.resize(error_.empty() ? threads : 0);
    for (unsigned z = 0; z < grid.z && error_.empty(); z++)
      for (unsigned y = 0; y < grid.y && error_.empty(); y++)
        for (unsigned x = 0; x < grid.x && error_.empty(); x++) {
          index = {x, y, z};
          // As on the device, contents are arbitrary.
          memory_.assign(shared_bytes, 0xa5);
          bytes_.assign(shared_bytes, Byte{});
          run_block();
        }
    current() = outer;
    return error_;
  }

  // Ends the block's run with a message.
  [[noreturn, gnu::format(printf, 2, 3)]] void stop(const char* format, ...) {
    va_list list;
    va_start(list, format);
    char text[512];
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    fail("%s (block %u, %u, %u, thread %d)", text, index.x, index.y, index.z, running_);
    threads_[running_].state = Thread::kDone;
    leave();
    std::abort();  // not reached
  }

  void barrier(Site site) { wait(Thread::kAtBarrier, site, nullptr); }

  // All lanes of the warp come here with an argument; then complete(arguments) is called once, and they go on.
  using Complete = void (*)(void* const* arguments);
  void exchange(Site site, Complete complete, void* argument) {
    complete_ = complete;
    wait(Thread::kAtExchange, site, argument);
  }

  // --- shared memory: checks, then the bytes ---

  uint8_t* access(uint32_t at, int size, bool write, Site site) {
    check_range(at, size, site);
    for (int i = 0; i < size; i++) {
      Byte& byte = bytes_[at + i];
      if (byte.in_flight)
        stop("%s: shared byte %u belongs to an asynchronous copy that was not waited for", site.text().c_str(), at + i);
      if (!write && !byte.written) stop("%s: shared byte %u is read, but was never written", site.text().c_str(), at + i);
      if (unordered(byte.write))
        stop("%s: shared byte %u is %s after thread %d wrote it, with no barrier between", site.text().c_str(), at + i,
             write ? "written" : "read", byte.write.thread);
      if (write && read_by_others(byte))
        stop("%s: shared byte %u is written after thread %d or others read it, with no barrier between",
             site.text().c_str(), at + i, byte.read.thread);
      const Byte::Access now = {running_, block_time_, warp_times_[running_ / kWarp]};
      if (write) {
        byte.write = now;
        byte.written = true;
        continue;
      }
      if (byte.read.block_time != block_time_) {
        byte.other_read_warp_time = -1;
        byte.read_by_warps = false;
      } else if (byte.read.thread / kWarp != running_ / kWarp) {
        byte.read_by_warps = true;
      } else if (byte.read.thread != running_) {
        byte.other_read_warp_time = byte.read.warp_time;
      }
      byte.read = now;
    }
    return memory_.data() + at;
  }

  void copy(Copy c, Site site) {
    check_range(c.to, c.bytes, site);
    access(c.to, c.bytes, true, site);
    for (int i = 0; i < c.bytes; i++) bytes_[c.to + i].in_flight = true;
    auto& groups = threads_[running_].copies;
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back(c);
  }
  void commit_copies() {
    auto& groups = threads_[running_].copies;
    if (groups.empty()) groups.emplace_back();
    groups.emplace_back();
  }
  // Until at most `left` committed groups are under way.
  void wait_copies(size_t left) {
    auto& groups = threads_[running_].copies;
    while (groups.size() > left + 1) {
      for (const Copy& c : groups.front()) {
        memset(memory_.data() + c.to, 0, c.bytes);
        if (c.inside > 0) memcpy(memory_.data() + c.to, c.from, c.inside);
        for (int i = 0; i < c.bytes; i++) {
          bytes_[c.to + i].in_flight = false;
          bytes_[c.to + i].write = {running_, block_time_, warp_times_[running_ / kWarp]};
        }
      }
      groups.erase(groups.begin());
    }
  }

 private:
  [[gnu::format(printf, 2, 3)]] void fail(const char* format, ...) {
    va_list list;
    va_start(list, format);
    char text[768];
    vsnprintf(text, sizeof text, format, list);
    va_end(list);
    if (error_.empty()) error_ = text;
  }

  void check_range(uint32_t at, int size, Site site) {
    if (size_t(at) + size > bytes_.size())
      stop("%s: shared bytes %u to %u of %zu", site.text().c_str(), at, at + size, bytes_.size());
    if (at % size) stop("%s: shared byte %u must be a multiple of %d", site.text().c_str(), at, size);
  }

  // Whether another thread did this since the last barrier with it.
  bool unordered(const Byte::Access& a) const {
    if (a.thread < 0 || a.thread == running_ || a.block_time != block_time_) return false;
    return a.thread / kWarp != running_ / kWarp || a.warp_time == warp_times_[running_ / kWarp];
  }

  bool read_by_others(const Byte& b) const {
    if (b.read.block_time != block_time_) return false;
    return b.read_by_warps || unordered(b.read) || b.other_read_warp_time == warp_times_[running_ / kWarp];
  }

  void run_block() {
    block_time_ = 0;
    warp_times_.assign((threads + kWarp - 1) / kWarp, 0);
    for (Thread& t : threads_) t.state = Thread::kNew, t.copies.clear();
    int done = 0;
    while (done < threads && error_.empty()) {
      done = 0;
      for (running_ = 0; running_ < threads && error_.empty(); running_++) {
        if (threads_[running_].state <= Thread::kReady) enter();
        done += threads_[running_].state == Thread::kDone;
      }
      if (done < threads && error_.empty()) release();
    }
    for (running_ = 0; running_ < threads && error_.empty(); running_++)
      for (const auto& group : threads_[running_].copies)
        if (!group.empty()) fail("thread %d ends with asynchronous copies that it did not wait for", running_);
  }

  // Every thread waits or is done: lets go those whose partners are all there.
  void release() {
    bool moved = false;
    for (int w = 0; w * kWarp < threads; w++) {
      const int first = w * kWarp;
      bool all = first + kWarp <= threads;
      for (int i = first; all && i < first + kWarp; i++)
        all = threads_[i].state == Thread::kAtExchange && threads_[i].site == threads_[first].site;
      if (!all) continue;
      void* arguments[kWarp];
      for (int i = 0; i < kWarp; i++) arguments[i] = threads_[first + i].argument;
      exchanges_[first / kWarp](arguments);
      warp_times_[w]++;
      for (int i = 0; i < kWarp; i++) threads_[first + i].state = Thread::kReady;
      moved = true;
    }
    if (moved) return;
    bool all = true;
    for (const Thread& t : threads_) all = all && t.state == Thread::kAtBarrier && t.site == threads_[0].site;
    if (!all) return explain();
    block_time_++;
    for (Thread& t : threads_) t.state = Thread::kReady;
  }

  // Two threads that wait for each other at different places.
  void explain() {
    const auto where = [](const Thread& t) { return t.state == Thread::kDone ? "its end" : t.site.text(); };
    for (int i = 0; i < threads; i++)
      for (int j = 0; j < i; j++) {
        const bool same_warp = i / kWarp == j / kWarp;
        const bool partners =
            same_warp || (threads_[i].state != Thread::kAtExchange && threads_[j].state != Thread::kAtExchange);
        if (partners && where(threads_[i]) != where(threads_[j]))
          return fail("divergent: thread %d waits in %s, thread %d in %s (block %u, %u, %u)", j, where(threads_[j]).c_str(),
                      i, where(threads_[i]).c_str(), index.x, index.y, index.z);
      }
    fail("a warp exchange needs whole warps, got a block of %d threads: %s", threads, where(threads_[0]).c_str());
  }

  void wait(decltype(Thread::state) state, Site site, void* argument) {
    Thread& t = threads_[running_];
    t.state = state;
    t.site = site;
    t.argument = argument;
    if (state == Thread::kAtExchange) {
      exchanges_.resize(warp_times_.size());
      exchanges_[running_ / kWarp] = complete_;
    }
    leave();
  }

  // _setjmp and _longjmp switch without a system call; a context is only made to begin.
  void enter() {
    Thread& t = threads_[running_];
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, t.stack.get(), kStack);
#endif
    if (_setjmp(scheduler_) == 0) {
      if (t.state == Thread::kNew) {
        t.state = Thread::kReady;
        getcontext(&t.context);
        t.context.uc_stack = {t.stack.get(), 0, kStack};
        t.context.uc_link = nullptr;
        makecontext(&t.context, &Block::begin, 0);
        setcontext(&t.context);
      }
      _longjmp(t.jump, 1);
    }
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  }
  void leave() {
    Thread& t = threads_[running_];
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(t.state == Thread::kDone ? nullptr : &fake, scheduler_stack_, scheduler_size_);
#endif
    if (_setjmp(t.jump) == 0) _longjmp(scheduler_, 1);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_size_);
#endif
  }
  static void begin() {
    Block* const block = current();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack_, &block->scheduler_size_);
#endif
    (*block->kernel_)();
    block->threads_[block->running_].state = Thread::kDone;
    block->leave();
  }

  std::vector<Thread> threads_;
  std::vector<int32_t> warp_times_;
  std::vector<Complete> exchanges_;  // of each warp
  std::vector<Byte> bytes_;
  std::vector<uint8_t> memory_;
  const std::function<void()>* kernel_;
  Complete complete_;
  jmp_buf scheduler_;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
  std::string error_;
  int32_t running_ = 0, block_time_ = 0;
};

}  // namespace emulator
}  // namespace sk::gpu
