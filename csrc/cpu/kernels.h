// Single-threaded passes over contiguous elements, one per (spec, instruction set).
#pragma once

#include "../plan/task.h"

namespace nesterov_pp::cpu {

// With `streaming`, a pass writes the new version past the caches. This is for versions that were not read and are too
// large to stay in the caches.
using Kernel = void (*)(const Run&, const StepRow&, bool streaming);

// Returns the sum of squares of a contiguous run, in partial sums over at most kSquaresRun elements; the bits are the
// same for every instruction set.
using Squares = double (*)(const void* values, long long count);
constexpr long long kSquaresRun = 8192;

enum class Isa : int { kBaseline = 0, kV3 = 1, kV4 = 2 };

Isa best_isa();             // the widest that this processor runs
const char* isa_name(Isa);  // "baseline", "x86-64-v3", "x86-64-v4"

// Returns the kernel of a spec, or null if there is no such pass (spec.h).
Kernel kernel(Isa, const Spec&);
Squares squares(Isa, Dtype);

// Lookups like these two for a single instruction set, each in its own file; the wider sets exist only on x86-64.
Kernel kernel_baseline(const Spec&);
Kernel kernel_v3(const Spec&);
Kernel kernel_v4(const Spec&);
Squares squares_baseline(Dtype);
Squares squares_v3(Dtype);
Squares squares_v4(Dtype);

// Copies a weight that received no gradient into the next ring slot.
void carry(const void* from, void* to, long long bytes);

}  // namespace nesterov_pp::cpu
