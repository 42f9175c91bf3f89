// Random nodes for all operators, most of them broken in some ways, created and computed through the library's own
// registration in a runtime of ours (fake_runtime.h). Built with sanitizers (LIT_BINQ_SANITIZE), which end the program
// where memory or the language's rules are left; the same generator's unbroken nodes must compute, and write every
// element of their outputs.
//
//     operator_fuzz [--count N] [--seed S]     execution i has the seed S + i: `--count 1` repeats one
//
// One execution is one node created or refused and, where created, computed. Prints how many there were of each kind.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>

#include "sets/kernel_sets.h"
#include "tests/fake_runtime.h"
#include "tests/random_nodes.h"

#if defined(__SANITIZE_ADDRESS__)
extern "C" void __sanitizer_set_death_callback(void (*)());
#endif

using namespace lit_binq;

namespace {

uint64_t current_seed = 0;

void say_seed() {
  std::fprintf(stderr, "\noperator_fuzz: ended at --seed %llu --count 1\n",
               static_cast<unsigned long long>(current_seed));
}

struct Count {
  int64_t executions = 0, created = 0, computed = 0;
};

// False where a node that nothing was done to fails.
bool execute(uint64_t seed, std::map<std::string, Count>& counts) {
  current_seed = seed;
  Random random{seed * 0x2545f4914f6cdd1du};
  FakeNode node = random_node(random);
  const int64_t faults = random.one_in(4) ? 0 : random.one_in(2) ? 1 : 2 + random.below(4);
  for (int64_t i = 0; i < faults; ++i) damage(random, node);
  misplace(random, node);
  const char* const mode = random.of<const char*>({nullptr, nullptr, "lut", "exact"});
  static const std::vector<const char*> sets = [] {
    std::vector<const char*> names;
    for (int i = 0; const KernelSet* set = kernel_set(i); ++i) {
      if (runs_here(*set)) names.push_back(set->name);
    }
    return names;
  }();
  std::map<std::string, std::string> entries;
  if (mode != nullptr) entries["lit_binq.mode"] = mode;
  entries["lit_binq.kernels"] = sets[static_cast<size_t>(random.below(static_cast<int64_t>(sets.size())))];
  const std::string refused = register_operators(entries);
  if (!refused.empty()) return std::printf("registration: %s\n", refused.c_str()), false;
  const int64_t before = alive();
  const Ran ran = run(node, random.one_in(4) ? 2 : 1);
  const char* const kind = node.kind.c_str();
  Count& count = counts[node.kind];
  ++count.executions, count.created += ran.created, count.computed += ran.computed;
  if (alive() != before)
    return std::printf("%s: %lld handles of the runtime are not released\n", kind,
                       static_cast<long long>(alive() - before)),
           false;
  if (faults != 0) return true;
  if (!ran.computed || !ran.inferred)
    return std::printf("%s: a node without faults fails: %s\n", kind, ran.error.c_str()), false;
  for (const auto& output : ran.outputs) {
    for (size_t i = 0; i < output->bytes; i += sizeof(uint32_t)) {
      uint32_t word;
      std::memcpy(&word, output->data() + i, sizeof word);
      if (word == 0xffffffffu) return std::printf("%s: an element of an output is not written\n", kind), false;
    }
  }
  return true;
}

}  // namespace

int main(int argc, char** argv) {
  uint64_t count = 20000, seed = 1;
  for (int i = 1; i + 1 < argc; i += 2) {
    if (std::strcmp(argv[i], "--count") == 0) count = std::strtoull(argv[i + 1], nullptr, 10);
    if (std::strcmp(argv[i], "--seed") == 0) seed = std::strtoull(argv[i + 1], nullptr, 10);
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_set_death_callback(say_seed);
#endif
  std::map<std::string, Count> counts;
  for (uint64_t i = 0; i < count; ++i) {
    if (!execute(seed + i, counts)) return say_seed(), 1;
    if ((i + 1) % 100000 == 0)
      std::printf("%llu executions\n", static_cast<unsigned long long>(i + 1)), std::fflush(stdout);
  }
  Count all;
  for (const auto& [name, c] : counts) {
    std::printf("%-20s %9lld executions, %9lld created, %9lld computed\n", name.c_str(),
                static_cast<long long>(c.executions), static_cast<long long>(c.created),
                static_cast<long long>(c.computed));
    all.executions += c.executions, all.created += c.created, all.computed += c.computed;
  }
  std::printf("%-20s %9lld executions, %9lld created, %9lld computed\n", "all", static_cast<long long>(all.executions),
              static_cast<long long>(all.created), static_cast<long long>(all.computed));
  return 0;
}
