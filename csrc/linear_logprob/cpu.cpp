// The CPU scan of srppo_kernels/linear_logprob: hidden states and head to (m, s, t, z_y) a row, without the logits.
//
// Work is cut into (vocabulary group x row block) tasks, each with its own scratch; groups are fixed and merged in
// order at the end, row by row in float64. So a row's bits depend on neither the rows beside it nor the number of
// threads, nor on how many of them a bounded workspace has room for.
//
// With bf16 inputs K goes in pairs on AMX tiles (amx_logits.h) or with AVX-512 BF16 (bf16_tile.h); everything else is
// widened to fp32 when it is packed, which is exact.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "../common/cut.h"
#include "../common/scratch.h"
#include "../common/tensors.h"
#include "../common/workers.h"
#include "amx_logits.h"
#include "bf16_tile.h"

namespace srppo {
namespace {

struct ScanArgs {
  float logit_scale, softcap;  // softcap 0: none
  bool entropy, kept_is_bf16;
};

struct Partial {
  float m, s, t, zy;
};

// Per row, of `n` rows: its place in the hidden states, and where its exponentials are kept; nullptr for in order.
struct RowArgs {
  std::int64_t n;
  const std::int64_t *target, *row_of, *kept_row_of;
  const float* temperatures;  // or nullptr, and `temperature` for all
  float temperature;

  std::int64_t row(std::int64_t i) const { return row_of ? row_of[i] : i; }
  std::int64_t kept_row(std::int64_t i) const { return kept_row_of ? kept_row_of[i] : i; }
  float temperature_of(std::int64_t i) const { return temperatures ? temperatures[i] : temperature; }
};

}  // namespace
}  // namespace srppo

#define SRPPO_KERNELS "../linear_logprob/cpu_kernels.h"
#include "../common/each_level.h"
#include "amx_softmax.h"

namespace srppo {
namespace {

// A matrix of rows of any supported dtype.
struct Matrix {
  const char* data;
  std::int64_t rows, width, stride, item;
  ScalarType type;

  Matrix(const Tensor& tensor, const char* name)
      : data(static_cast<const char*>(tensor.const_data_ptr())), rows(tensor.size(0)), width(tensor.size(1)),
        stride(tensor.stride(0)), item(tensor.scalar_type() == ScalarType::Float ? 4 : 2), type(tensor.scalar_type()) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.dim() == 2 && (tensor.stride(1) == 1 || width <= 1 || rows == 0),
                    "srppo_native: ", name, " must be a CPU matrix with contiguous rows");
    STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                    "srppo_native: ", name, " must be float32, bfloat16 or float16");
  }

  const char* row(std::int64_t i) const { return data + i * stride * item; }
};

// Rows packed or widened with `pairs`: pairs of bf16 in the bits of a float; else floats.
struct Packer {
  bool pairs;
  std::int64_t steps;  // floats a row
  void (*widen_bf16)(const std::uint16_t*, std::int64_t, float*);
  void (*widen_fp16)(const std::uint16_t*, std::int64_t, float*);

  void row(const Matrix& matrix, std::int64_t i, float* out) const {
    const char* source = matrix.row(i);
    if (pairs) {
      if (matrix.width % 2) out[steps - 1] = 0.0f;
      std::memcpy(out, source, static_cast<std::size_t>(2 * matrix.width));
    } else if (matrix.type == ScalarType::BFloat16) {
      widen_bf16(reinterpret_cast<const std::uint16_t*>(source), matrix.width, out);
    } else if (matrix.type == ScalarType::Half) {
      widen_fp16(reinterpret_cast<const std::uint16_t*>(source), matrix.width, out);
    } else {
      std::memcpy(out, source, static_cast<std::size_t>(4 * matrix.width));
    }
  }
};

constexpr std::int64_t kRowBlock = 336;  // rows a task: packing a panel is then 1 or 2 % of its multiplications
constexpr std::int64_t kFewestRows = 64;  // a task, where threads share a small workspace; below, fewer of them work
constexpr std::int64_t kWidestPanel = 32;  // vocabulary entries, at AVX-512

// Rows of the head a panel at a time, packed for the tiles.
struct PanelReader {
  const Matrix& weight;
  const Packer& packer;
  void (*pack)(const float* const*, std::int64_t, float*);
  std::int64_t panel;
  bool direct;  // rows are read where they lie: they need no widening, and end with a whole float
  Scratch<float> widened, zeros;

  PanelReader(const Matrix& matrix, const Packer& rows, void (*pack_panel)(const float* const*, std::int64_t, float*),
              std::int64_t entries)
      : weight(matrix), packer(rows), pack(pack_panel), panel(entries), direct(reads_directly(matrix, rows)),
        widened(direct ? 0 : entries * rows.steps), zeros(rows.steps) {
    std::fill(zeros.data(), zeros.data() + rows.steps, 0.0f);
  }

  static bool reads_directly(const Matrix& matrix, const Packer& rows) {
    return rows.pairs ? matrix.width % 2 == 0 : matrix.type == ScalarType::Float;
  }

  // Entries [begin, begin + panel), zero from `end` on.
  void read(std::int64_t begin, std::int64_t end, float* out) {
    const float* sources[kWidestPanel];
    for (std::int64_t i = 0; i < panel; ++i) {
      sources[i] = zeros.data();
      if (begin + i >= end) continue;
      if (direct) {
        sources[i] = reinterpret_cast<const float*>(weight.row(begin + i));
      } else {
        float* row = widened.data() + i * packer.steps;
        packer.row(weight, begin + i, row);
        sources[i] = row;
      }
    }
    pack(sources, packer.steps, out);
  }
};

// The next panel's rows of the head, in shares for the tiles of this one.
struct NextPanel {
  const char *at, *end;
  std::int64_t unit, count;  // bytes fetched at a time, and times a share

  NextPanel(const Matrix& weight, std::int64_t begin, std::int64_t panel, std::int64_t shares, std::int64_t unit_)
      : unit(unit_) {
    const std::int64_t entries = std::clamp<std::int64_t>(weight.rows - begin, 0, panel);
    const std::int64_t bytes = weight.stride == weight.width ? entries * weight.width * weight.item : 0;
    at = entries ? weight.row(begin) : nullptr;
    end = at + bytes;
    count = bytes / unit / shares + 1;
  }

  Ahead next(std::int64_t steps) {
    const std::int64_t here = std::min(count, (end - at + unit - 1) / unit);
    const Ahead share(at, unit, here, steps);
    at += unit * here;
    return share;
  }
};

// What an instruction level and the inputs' dtypes choose.
struct VectorTile {
  int (*height)(std::int64_t rows);
  void (*multiply)(int rows, const float* x, const float* panel, std::int64_t steps, float* z, std::int64_t ldz,
                   const Ahead& lines);
  void (*pack_panel)(const float* const*, std::int64_t, float*);
  std::int64_t panel, fetched;  // columns; bytes that `multiply` fetches at a time
};

// Logits of a block of rows with vector instructions.
class VectorLogits {
 public:
  VectorLogits(const Matrix& weight, const Packer& packer, const VectorTile& tile, std::int64_t rows)
      : weight_(weight), packer_(packer), tile_(tile), rows_(rows * packer.steps), row_(packer.steps),
        packed_(tile.panel * packer.steps), reader_(weight, packer, tile.pack_panel, tile.panel) {}

  template <class RowAt>
  void set_rows(const Matrix& x, std::int64_t count, const RowAt& row_at) {
    const std::int64_t steps = packer_.steps;
    for (std::int64_t r = 0; r < count;) {
      const int height = tile_.height(count - r);
      float* out = rows_.data() + r * steps;
      for (int i = 0; i < height; ++i) {
        packer_.row(x, row_at(r + i), row_.data());
        for (std::int64_t k = 0; k < steps; ++k) out[k * height + i] = row_.data()[k];
      }
      r += height;
    }
  }

  // z[count][size] of entries [v0, v0 + size); z has room for whole panels.
  void multiply(std::int64_t count, std::int64_t v0, std::int64_t size, float* z, std::int64_t ldz) {
    const std::int64_t steps = packer_.steps;
    const std::int64_t tiles = (count + tile_.height(count) - 1) / tile_.height(count);
    for (std::int64_t p = 0; p < size; p += tile_.panel) {
      reader_.read(v0 + p, v0 + size, packed_.data());
      NextPanel ahead(weight_, v0 + p + tile_.panel, tile_.panel, tiles, tile_.fetched);
      for (std::int64_t r = 0; r < count;) {
        const int height = tile_.height(count - r);
        tile_.multiply(height, rows_.data() + r * steps, packed_.data(), steps, z + r * ldz + p, ldz, ahead.next(steps));
        r += height;
      }
    }
  }

 private:
  const Matrix& weight_;
  const Packer& packer_;
  VectorTile tile_;
  Scratch<float> rows_, row_, packed_;
  PanelReader reader_;
};

// Where exponentials go that the backward reads, and the maxima of groups that they are relative to.
struct Kept {
  char* data = nullptr;  // [rows, V], or null: none are kept
  float* max = nullptr;  // [rows, groups]
  bool bf16 = false;     // fp32 otherwise

  Kept() = default;
  Kept(const std::optional<Tensor>& kept, const std::optional<Tensor>& group_max, std::int64_t vocab, std::int64_t groups) {
    if (!kept) return;
    STD_TORCH_CHECK(group_max && kept->is_contiguous() && kept->size(1) == vocab && group_max->is_contiguous() &&
                        group_max->size(1) == groups,
                    "srppo_native: kept must be [rows, V] with group_max [rows, groups]");
    data = static_cast<char*>(kept->mutable_data_ptr());
    max = static_cast<float*>(group_max->mutable_data_ptr());
    bf16 = kept->scalar_type() == ScalarType::BFloat16;
  }

  char* at(std::int64_t entry) const { return data ? data + entry * (bf16 ? 2 : 4) : nullptr; }
};

// A scan: what every way of multiplying needs.
struct Scan {
  const Matrix &x, &w;
  const RowArgs& of;
  const float* biases;  // or null
  std::int64_t group;
  ScanArgs args;
  Kept kept;

  std::int64_t vocab() const { return w.rows; }
  std::int64_t groups() const { return (w.rows + group - 1) / group; }
  bool in_pairs() const { return x.type == ScalarType::BFloat16 && w.type == ScalarType::BFloat16; }
};

#if defined(__x86_64__)
constexpr std::int64_t kTileRowBytes = 16 << 20;  // of rows packed at once for AMX tiles, which all threads read

// The scan of bf16 inputs on AMX tiles. Rows are packed once, kTileRowBytes of them at a time, by all threads for all.
// A task is a vocabulary group and a block of them, blocks innermost, so that a group is in L3 for all but the first.
void scan_on_tiles(const Scan& scan, std::int64_t workspace, Partial* partials) {
  const Matrix &x = scan.x, &w = scan.w;
  const RowArgs& of = scan.of;
  const ScanArgs& args = scan.args;
  const float* const biases = scan.biases;
  const std::int64_t group = scan.group, vocab = scan.vocab(), width = x.width, groups = scan.groups();
  const auto* weight = reinterpret_cast<const std::uint16_t*>(w.data);
  auto* const kept = reinterpret_cast<std::uint16_t*>(scan.kept.data);
  float* const kept_max = scan.kept.max;
  const auto softmax = kept ? (args.entropy ? &tile_softmax<true, true> : &tile_softmax<false, true>)
                            : (args.entropy ? &tile_softmax<true, false> : &tile_softmax<false, false>);
  // Rows at once take half of the workspace at most, and leave what a thread needs.
  const std::int64_t row_bytes = std::max<std::int64_t>(1, 2 * whole_tiles(width, kTileDepth));
  const bool in_parts = TileHead::part_of(width) < width;
  const auto each = [&](std::int64_t rows) {
    return rows * static_cast<std::int64_t>((in_parts ? 4 * kTileEntries : 0) + sizeof(TileState) / kTilePanel) +
           TileHead::kMostBytes + 8 * kTileSums;
  };
  const std::int64_t row_block = tile_row_block(width);
  const std::int64_t set_bytes = (width + 1) / 2 * 4 * (width % 2 ? kTilePanel + 1 : 1);  // of set_panel()
  const std::int64_t least = std::max(each(kTileFewestRows), set_bytes);
  const std::int64_t fitting = std::min({kTileRowBytes, workspace / 2, workspace - least}) / row_bytes;
  const std::int64_t unit = fitting < row_block ? kTileFewestRows : row_block;
  const std::int64_t most = std::max(kTileFewestRows, fitting / unit * unit);
  workspace = std::max<std::int64_t>(0, workspace - std::min(most, whole_tiles(of.n, kTilePanel)) * row_bytes);
  // Many threads take fewer rows a task, as elsewhere.
  const std::int64_t room = (workspace / threads_there() - each(0)) / (each(1) - each(0)) / kTilePanel * kTilePanel;
  const std::int64_t most_block = std::clamp(room, kTileFewestRows, row_block);
  for (std::int64_t first = 0; first < of.n; first += most) {
    const std::int64_t count = std::min(most, of.n - first), panels = (count + kTilePanel - 1) / kTilePanel;
    const Side across{panels, most_block / kTilePanel, 1, 2};  // panels; copying the head as two of them [estimated]
    const std::int64_t block = cut_for(across, Side{groups, 1, 1, 0}, threads_there()).rows;  // panels
    const std::int64_t blocks = across.blocks(block);
    TileRows rows(width, count);
    parallel_within(workspace, set_bytes, panels, [&](std::int64_t begin, std::int64_t end) {
      const auto row_at = [&](std::int64_t r) { return of.row(first + r); };
      for (std::int64_t p = begin; p < end; ++p) rows.set_panel(p, x, count, row_at, &pack_tile_panel);
    });
    parallel_within(workspace, each(block * kTilePanel), groups * blocks, [&](std::int64_t begin, std::int64_t end) {
      TileHead head(weight, w.stride, width, vocab);
      TileBlocks sums(head.parts(), block);
      Scratch<TileState> states(block);
      const tiles::InUse in_use;
      const auto begin_of = [&](std::int64_t task) { return task / blocks * group; };
      head.copy_next(begin_of(begin), begin_of(begin) + group, 0, 1);
      for (std::int64_t task = begin; task < end; ++task) {
        const std::int64_t g = task / blocks, p0 = task % blocks * block, here = std::min(block, panels - p0);
        const std::int64_t v0 = g * group, size = std::min(group, vocab - v0);
        bool plain = args.logit_scale == 1.0f && args.softcap == 0.0f && !biases;
        for (std::int64_t r = 0; r < here * kTilePanel; ++r) {
          TileState& state = states.data()[r / kTilePanel];
          const std::int64_t at = r % kTilePanel, local = p0 * kTilePanel + r, i = first + local;
          const bool live = local < count;  // the last panel may have rows of zeros
          if (at == 0) state.begin();
          state.temperature[at] = live ? of.temperature_of(i) : 1.0f;
          plain = plain && state.temperature[at] == 1.0f;
          const std::int64_t column = live ? of.target[i] - v0 : -1;
          state.column[at] = column >= 0 && column < size ? static_cast<std::int32_t>(column) : -1;
          state.kept[at] = live && kept ? kept + of.kept_row(i) * vocab + v0 : nullptr;
        }
        const std::int64_t next = task + 1 < end ? begin_of(task + 1) : vocab;
        each_block(head, rows.panel(p0), rows.panel_words(), here, v0, size, next, next + group, sums,
                   [&](TileSteps& beside, float* z, const float* add, std::int64_t p, std::int64_t c, std::int64_t entries) {
                     softmax(args, beside, z, add, c, entries, biases ? biases + v0 + c : nullptr, plain, states.data()[p]);
                   });
        for (std::int64_t r = 0; r < here * kTilePanel && p0 * kTilePanel + r < count; ++r) {
          const TileState& state = states.data()[r / kTilePanel];
          const std::int64_t at = r % kTilePanel, i = first + p0 * kTilePanel + r;
          partials[g * of.n + i] = {state.m[at], state.s[at], state.t[at], state.zy[at]};
          if (kept_max) kept_max[of.kept_row(i) * groups + g] = state.reference[at];
        }
      }
    });
  }
}
#endif

// The scan of all inputs on vector tiles. A task is a block of rows and a vocabulary group, groups innermost: a thread then
// packs its rows once for many of them.
void scan_on_vectors(const Scan& scan, std::int64_t workspace, Partial* partials) {
  const Matrix &x = scan.x, &w = scan.w;
  const RowArgs& of = scan.of;
  const float* const biases = scan.biases;
  const std::int64_t group = scan.group, vocab = scan.vocab(), groups = scan.groups(), n = of.n;
  VectorTile tile{SRPPO_AT_LEVEL(tile_height), SRPPO_AT_LEVEL(multiply), SRPPO_AT_LEVEL(pack_panel),
                  SRPPO_AT_LEVEL(panel_width)(), SRPPO_AT_LEVEL(fetched_bytes)()};
  Packer packer{false, x.width, SRPPO_AT_LEVEL(widen_bf16), SRPPO_AT_LEVEL(widen_fp16)};
#if defined(__x86_64__)
  if (scan.in_pairs() && cpu_level() >= CpuLevel::avx512_bf16) {
    packer.pairs = true;
    packer.steps = (x.width + 1) / 2;
    tile.fetched = 64;
    tile.multiply = [](int rows, const float* a, const float* b, std::int64_t steps, float* z, std::int64_t ldz,
                       const Ahead& lines) {
      const auto bits = [](const float* packed) { return reinterpret_cast<const std::uint32_t*>(packed); };
      bf16_multiply(rows, bits(a), bits(b), steps, z, ldz, false, lines);
    };
  }
#endif
  const auto softmax_row = SRPPO_AT_LEVEL(softmax_row);

  // Not a multiple of 4096 bytes, where the rows of a tile would share the sets of L1.
  const std::int64_t ldz = (std::min(group, vocab) + tile.panel - 1) / tile.panel * tile.panel + 16;
  // A thread's: a panel packed and, where it is, widened; two rows; and rows packed, with their logits.
  const std::int64_t panels = PanelReader::reads_directly(w, packer) ? 1 : 2;
  const auto each = [&](std::int64_t rows) {
    return 4 * ((panels * tile.panel + 2) * packer.steps + rows * (packer.steps + ldz));
  };
  const std::int64_t room = (workspace / threads_there() - each(0)) / (each(1) - each(0)) / kFewestRows * kFewestRows;
  // Packing a panel of the head takes as long as 16 rows by it: 5 % of the time at 336.
  const Side rows{n, std::clamp(room, kFewestRows, kRowBlock), 1, 16};
  const std::int64_t block = cut_for(rows, Side{groups, 1, 1, 0}, threads_there()).rows, row_blocks = rows.blocks(block);
  parallel_within(workspace, each(block), groups * row_blocks, [&](std::int64_t begin, std::int64_t end) {
    VectorLogits logits(w, packer, tile, block);
    Scratch<float> z(block * ldz);
    std::int64_t packed_block = -1;
    for (std::int64_t task = begin; task < end; ++task) {
      const std::int64_t at = task / groups, g = task % groups;
      const std::int64_t first = at * block, count = std::min(block, n - first);
      if (packed_block != at) {
        packed_block = at;
        logits.set_rows(x, count, [&](std::int64_t r) { return of.row(first + r); });
      }
      const std::int64_t v0 = g * group, size = std::min(group, vocab - v0);
      logits.multiply(count, v0, size, z.data(), ldz);
      for (std::int64_t r = 0; r < count; ++r) {
        const std::int64_t i = first + r, column = of.target[i] - v0, row = of.kept_row(i);
        const Partial partial = softmax_row(scan.args, z.data() + r * ldz, size, biases ? biases + v0 : nullptr,
                                            of.temperature_of(i), column >= 0 && column < size ? column : -1,
                                            scan.kept.at(row * vocab + v0));
        partials[g * n + i] = partial;
        if (scan.kept.max) scan.kept.max[row * groups + g] = partial.m;
      }
    }
  });
}

// A row's groups together, in their order: maximum, sum of exponentials, sum of exponential times logit, and z_y; [4, n].
void merge(const Partial* partials, std::int64_t groups, std::int64_t n, float* out) {
  torch::stable::parallel_for(0, n, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      float m = std::numeric_limits<float>::lowest();
      for (std::int64_t g = 0; g < groups; ++g) m = std::max(m, partials[g * n + i].m);
      double s = 0, t = 0, zy = 0;
      for (std::int64_t g = 0; g < groups; ++g) {
        const Partial& part = partials[g * n + i];
        const double shift = static_cast<double>(part.m) - static_cast<double>(m), factor = std::exp(shift);
        s += static_cast<double>(part.s) * factor;
        t += (static_cast<double>(part.t) + static_cast<double>(part.s) * shift) * factor;
        zy += static_cast<double>(part.zy);
      }
      out[i] = m;
      out[n + i] = static_cast<float>(s);
      out[2 * n + i] = static_cast<float>(t);
      out[3 * n + i] = static_cast<float>(zy);
    }
  });
}

Tensor linear_logprob_scan(const Tensor& hidden, const Tensor& weight, const std::optional<Tensor>& bias,
                           const Tensor& targets, const std::optional<Tensor>& index,
                           const std::optional<Tensor>& row_temperature, double temperature, double logit_scale,
                           double softcap, bool entropy, std::int64_t group, const std::optional<Tensor>& kept,
                           const std::optional<Tensor>& group_max, const std::optional<Tensor>& kept_rows,
                           std::optional<std::int64_t> bound) {
  const Matrix x(hidden, "hidden"), w(weight, "weight");
  STD_TORCH_CHECK(x.width == w.width, "srppo_native: hidden and weight have different widths");
  check(targets, ScalarType::Long, -1, "targets");
  const std::int64_t n = targets.numel();
  const auto longs = [&](const std::optional<Tensor>& tensor, const char* name) -> const std::int64_t* {
    if (!tensor) return nullptr;
    check(*tensor, ScalarType::Long, n, name);
    return static_cast<const std::int64_t*>(tensor->const_data_ptr());
  };
  const RowArgs of{n,
                   static_cast<const std::int64_t*>(targets.const_data_ptr()),
                   longs(index, "index"),
                   longs(kept_rows, "kept_rows"),
                   floats(row_temperature, n, "row_temperature"),
                   static_cast<float>(temperature)};
  Scan scan{x, w, of, floats(bias, w.rows, "bias"), group, {}, {}};
  scan.kept = Kept(kept, group_max, scan.vocab(), scan.groups());
  scan.args.logit_scale = static_cast<float>(logit_scale);
  scan.args.softcap = static_cast<float>(softcap);
  scan.args.entropy = entropy;
  scan.args.kept_is_bf16 = scan.kept.bf16;

  std::vector<Partial> partials(static_cast<std::size_t>(scan.groups() * n));
  const std::int64_t held = static_cast<std::int64_t>(sizeof(Partial)) * (scan.groups() + 1) * n;  // and the result
  const std::int64_t workspace = std::max<std::int64_t>(0, workspace_of(bound) - held);
  const bool kept_in_pairs = !scan.kept.data || scan.kept.bf16;
  if (scan.in_pairs() && kept_in_pairs && cpu_level() >= CpuLevel::amx) {
#if defined(__x86_64__)
    scan_on_tiles(scan, workspace, partials.data());
#endif
  } else {
    scan_on_vectors(scan, workspace, partials.data());
  }

  Tensor state = torch::stable::new_empty(targets, {4, n}, ScalarType::Float);
  merge(partials.data(), scan.groups(), n, mutable_floats(state));
  return state;
}

}  // namespace
}  // namespace srppo

STABLE_TORCH_LIBRARY_FRAGMENT(srppo_native, m) {
  m.def(
      "linear_logprob_scan(Tensor hidden, Tensor weight, Tensor? bias, Tensor targets, Tensor? index, "
      "Tensor? row_temperature, float temperature, float logit_scale, float softcap, bool entropy, int group, "
      "Tensor(a!)? kept, Tensor(b!)? group_max, Tensor? kept_rows, int? workspace=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(srppo_native, CPU, m) {
  m.impl("linear_logprob_scan", TORCH_BOX(&srppo::linear_logprob_scan));
}
