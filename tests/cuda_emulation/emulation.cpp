#include "../../csrc/cuda/stream.h"

#include "emulation.h"

#include <setjmp.h>
#include <ucontext.h>

#include <deque>
#include <memory>
#include <utility>
#include <vector>

namespace bcos::emulation {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStack = 64 * 1024;
constexpr size_t kShared = 227 * 1024;  // what a block may have on sm_90

struct Copy {
  void* to;
  const void* from;
};

// Copies land by wait_for_copies, or at once.
void land(const Copy& c) {
  c.from ? std::memcpy(c.to, c.from, 16) : std::memset(c.to, 0, 16);
}

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started = false, done = true;
  // It waits until *signal differs from `seen`.
  const int64_t* signal = nullptr;
  int64_t seen = 0;
  std::vector<Copy> open;
  std::deque<std::vector<Copy>> closed;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStack]};

  bool ready() const { return !done && (signal == nullptr || *signal != seen); }
};

struct Warp {
  int arrived = 0;
  int64_t rounds = 0;
  const char* name = nullptr;
  void* arguments[kWarp];
};

alignas(128) unsigned char memory[kShared];
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<Warp> warps;
int threads, current, at_barrier, finished;
int64_t barriers;
jmp_buf scheduler;
const std::function<void()>* body;
std::string failure;

void pass_on() {
  if (_setjmp(fibers[current]->at) == 0) _longjmp(scheduler, 1);
}

// From inside a thread: the scheduler ends the launch.
void fail(const std::string& what) {
  failure = what;
  pass_on();
}

// An exception must not leave its fiber.
void run_body() {
  try {
    (*body)();
  } catch (const std::exception& error) {
    fail(error.what());
  }
}

void fiber_main() {
  for (;;) {
    run_body();
    Fiber& me = *fibers[current];
    for (const auto& group : me.closed) {
      if (!group.empty()) fail("a thread ended with copies under way");
    }
    me.closed.clear();
    me.done = true;
    ++finished;
    pass_on();
  }
}

void wait_for(const int64_t& signal, int64_t seen) {
  fibers[current]->signal = &signal;
  fibers[current]->seen = seen;
  pass_on();
}

void resume(int thread) {
  current = thread;
  thread_index.x = static_cast<unsigned>(thread);
  Fiber& f = *fibers[thread];
  f.signal = nullptr;
  if (_setjmp(scheduler) != 0) return;
  if (f.started) _longjmp(f.at, 1);
  f.started = true;
  setcontext(&f.start);
}

void prepare(int count) {
  while (static_cast<int>(fibers.size()) < count) {
    auto f = std::make_unique<Fiber>();
    getcontext(&f->start);
    f->start.uc_stack.ss_sp = f->stack.get();
    f->start.uc_stack.ss_size = kStack;
    f->start.uc_link = nullptr;
    makecontext(&f->start, fiber_main, 0);
    fibers.push_back(std::move(f));
  }
}

void run_block() {
  finished = at_barrier = 0;
  warps.assign(threads / kWarp, Warp());
  for (int i = 0; i < threads; ++i) fibers[i]->done = false;
  const int count = threads / kWarp;
  while (finished < threads) {
    bool moved = false;
    for (int i = 0; i < count; ++i) {
      const int warp = schedule.last_warp_first ? count - 1 - i : i;
      for (bool ran = true; ran;) {
        ran = false;
        for (int lane = 0; lane < kWarp; ++lane) {
          if (fibers[warp * kWarp + lane]->ready()) {
            resume(warp * kWarp + lane);
            ran = moved = true;
            if (!failure.empty()) return;
          }
        }
      }
    }
    if (!moved) {
      failure = "every thread waits for one that does not come";
      return;
    }
  }
}

}  // namespace

unsigned char* shared_memory() { return memory; }

void run(unsigned blocks, unsigned block_threads, int shared_bytes, const std::function<void()>& kernel) {
  if (shared_bytes > static_cast<int>(kShared)) throw std::runtime_error("emulation: too much shared memory");
  if (block_threads % kWarp) throw std::runtime_error("emulation: a block of incomplete warps");
  ++counts.launches;
  threads = static_cast<int>(block_threads);
  body = &kernel;
  prepare(threads);
  block_size.x = block_threads;
  grid_size.x = blocks;
  for (unsigned b = 0; b < blocks; ++b) {
    block_index.x = b;
    std::memset(memory, 0xff, shared_bytes);  // NaN in every dtype
    run_block();
    if (!failure.empty()) {
      fibers.clear();  // they stand somewhere inside the kernel
      throw std::runtime_error("emulation: block " + std::to_string(b) + ": " + std::exchange(failure, ""));
    }
  }
}

void wait_for_block() {
  if (++at_barrier == threads) {
    at_barrier = 0;
    ++barriers;
  } else {
    wait_for(barriers, barriers);
  }
}

void with_warp(const char* name, void* argument, void (*execute)(void* const* arguments)) {
  Warp& warp = warps[current / kWarp];
  if (warp.arrived == 0) {
    warp.name = name;
  } else if (std::string(warp.name) != name) {
    fail(std::string("lanes of one warp at different instructions: ") + warp.name + " and " + name);
  }
  warp.arguments[current % kWarp] = argument;
  if (++warp.arrived == kWarp) {
    execute(warp.arguments);
    warp.arrived = 0;
    ++warp.rounds;
  } else {
    wait_for(warp.rounds, warp.rounds);
  }
}

void start_copy(void* to, const void* from) {
  const auto* begin = static_cast<unsigned char*>(to);
  if (begin < memory || begin + 16 > memory + kShared) fail("a background copy goes outside shared memory");
  if (schedule.copies_land_late) {
    fibers[current]->open.push_back({to, from});
  } else {
    land({to, from});
  }
}

void close_copies() {
  Fiber& me = *fibers[current];
  me.closed.push_back(std::move(me.open));
  me.open.clear();
}

void wait_for_copies(int pending) {
  auto& closed = fibers[current]->closed;
  while (static_cast<int>(closed.size()) > pending) {
    for (const Copy& c : closed.front()) land(c);
    closed.pop_front();
  }
}

}  // namespace bcos::emulation
