#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "primitives.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(_native, m) {
  using namespace ms;
  // For what waits for MLX: its thread may need the interpreter to let go of an array that Python owns.
  const nb::call_guard<nb::gil_scoped_release> unlocked;
  m.attr("mlx_version") = MS_MLX_VERSION;
  m.attr("interface") = kInterface;
  m.def("isa", [] { return std::string(kernels().name); });
  m.def("isas", [] { return std::string(isa_names()); });
  m.def("force_isa", [](const std::string& name, bool emulated) { return force_isa(name.c_str(), emulated); }, "name"_a, "emulated"_a = false);
  m.def("amx", [] { return nb::make_tuple(amx_use().faulty, amx_use().why); });
  m.def("threads", [] { return Pool::get().threads(); });
  m.def("set_threads", [](int n) { Pool::get().set_threads(n); }, "n"_a);
  m.def("available_threads", &available_threads);
  m.def("cgroup_cpus", &cgroup_cpus, "membership"_a, "mount"_a);

  nb::class_<Packed>(m, "Packed")
      .def_prop_ro("n", &Packed::n)
      .def_prop_ro("k", &Packed::k)
      .def_prop_ro("bits", &Packed::bits)
      .def_prop_ro("group_size", &Packed::group)
      .def_prop_ro("nbytes", &Packed::nbytes)
      .def_prop_ro("address", [](const Packed& p) { return reinterpret_cast<uintptr_t>(p.weight().data); })
      .def("slice", &Packed::slice, "start"_a, "stop"_a);
  nb::class_<RopeTable>(m, "RopeTable")
      .def_prop_ro("dims", &RopeTable::dims)
      .def_prop_ro("traditional", &RopeTable::traditional);
  m.def("rope_table", [](std::vector<double> f, bool traditional, double magnitude) { return std::make_shared<RopeTable>(std::move(f), traditional, magnitude); },
        "inv_freq"_a, "traditional"_a, "magnitude"_a = 1.0);
  m.def("pack_quantized", &Packed::quantized, "w"_a, "scales"_a, "biases"_a.none(), "group_size"_a, "bits"_a, unlocked);
  m.def("pack_dense", &Packed::dense, "w"_a, unlocked);

  m.def("linear", &linear, "x"_a, "w"_a, "bias"_a.none() = nb::none(), "mode"_a = "exact");
  m.def("gather_linear", &gather_linear, "x"_a, "experts"_a, "w"_a, "n"_a, "mode"_a = "exact");
  m.def("embed", &embed, "ids"_a, "w"_a, "dtype"_a);
  m.def("rms_norm", &rms_norm, "x"_a, "weight"_a.none(), "eps"_a);
  m.def("rope", &rope, "x"_a, "offsets"_a, "table"_a);
  m.def("gated", &gated, "gate"_a, "up"_a, "act"_a);
  m.def("kv_write", [](const mx::array& a, const mx::array& b, const mx::array& c, const mx::array& d, const mx::array& e, const mx::array& f, const KvCode& g, const KvCode& h) {
    auto r = kv_write(a, b, c, d, e, f, g, h);
    return nb::make_tuple(r[0], r[1]);
  }, "keys"_a, "values"_a, "k"_a, "v"_a, "rows"_a, "offsets"_a, "key_code"_a.none() = nb::none(), "value_code"_a.none() = nb::none());
  m.def("attention", &attend, "q"_a, "keys"_a, "values"_a, "rows"_a, "offsets"_a, "scale"_a, "window"_a = 0, "sinks"_a.none() = nb::none(),
        "key_code"_a.none() = nb::none(), "value_code"_a.none() = nb::none(), "latent"_a = false);
  m.def("can_reserve", &can_reserve, "bytes"_a, "pieces"_a);
  m.def("reserve", [](const std::vector<int>& shape, const mx::Dtype& dtype) { return reserve(mx::Shape(shape.begin(), shape.end()), dtype); }, "shape"_a, "dtype"_a);
  m.def("give_back", &give_back, "slabs"_a, "row"_a);
  m.def("put", &put, "target"_a, "value"_a, "rows"_a);

  struct LineList {
    std::shared_ptr<const std::vector<SampleLine>> lines;
  };
  using Line = std::tuple<float, int, float, float, uint32_t, uint32_t, int, int, int, float, float, float, int>;
  nb::class_<LineList>(m, "SampleLines").def("__len__", [](const LineList& l) { return l.lines->size(); });
  m.def("sample_lines", [](const std::vector<Line>& given) {
    std::vector<SampleLine> lines;
    for (const Line& l : given) lines.push_back(std::apply([](auto... v) { return SampleLine{v...}; }, l));
    return LineList{std::make_shared<const std::vector<SampleLine>>(std::move(lines))};
  }, "lines"_a);
  m.def("sample", [](const mx::array& logits, const LineList& lines, std::vector<uint32_t> positions, std::optional<mx::array> allowed, std::optional<mx::array> bias,
                     std::optional<mx::array> ban, std::optional<mx::array> output, std::optional<mx::array> prompt) {
    return sample(logits, lines.lines, std::move(positions), {allowed, bias, ban, output, prompt});
  }, "logits"_a, "lines"_a, "positions"_a, "allowed"_a.none() = nb::none(), "bias"_a.none() = nb::none(), "ban"_a.none() = nb::none(), "output"_a.none() = nb::none(), "prompt"_a.none() = nb::none());

  nb::class_<Decoder>(m, "Decoder")
      .def_prop_ro("layers", &Decoder::layers)
      .def("add_layer", [](Decoder& d, PackedPtr qkv, PackedPtr o, PackedPtr gate, PackedPtr up, PackedPtr down, mx::array in_norm, mx::array mlp_norm, RopePtr rope, int window,
                           std::optional<mx::array> qkv_bias, std::optional<mx::array> o_bias, std::optional<mx::array> q_norm, std::optional<mx::array> k_norm,
                           std::optional<mx::array> post_attn_norm, std::optional<mx::array> post_mlp_norm) {
             d.add_layer({qkv, o, gate, up, down, qkv_bias, o_bias, in_norm, mlp_norm, q_norm, k_norm, post_attn_norm, post_mlp_norm, rope, window});
           },
           "qkv"_a, "o"_a, "gate"_a, "up"_a, "down"_a, "in_norm"_a, "mlp_norm"_a, "rope"_a, "window"_a = 0, "qkv_bias"_a.none() = nb::none(), "o_bias"_a.none() = nb::none(),
           "q_norm"_a.none() = nb::none(), "k_norm"_a.none() = nb::none(), "post_attn_norm"_a.none() = nb::none(), "post_mlp_norm"_a.none() = nb::none(), unlocked);
  m.def("decoder", [](int heads, int kv_heads, int head_dim, float eps, float scale, float embed_scale, const std::string& act, const std::string& mode, PackedPtr embedding, const mx::array& final_norm) {
    return std::make_shared<Decoder>(heads, kv_heads, head_dim, eps, scale, embed_scale, act, mode, embedding, final_norm);
  }, "heads"_a, "kv_heads"_a, "head_dim"_a, "eps"_a, "scale"_a, "embed_scale"_a, "act"_a, "mode"_a, "embedding"_a, "final_norm"_a, unlocked);
  m.def("decoder_forward", &decoder_forward, "decoder"_a, "x"_a, "rows"_a, "offsets"_a, "slabs"_a, "key_code"_a.none() = nb::none(), "value_code"_a.none() = nb::none());
}
