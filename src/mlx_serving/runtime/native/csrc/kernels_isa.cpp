// Compiled once per instruction set, with MS_NS naming the namespace. Only C
// headers are included: an inline library function compiled here with wide
// instructions could be the copy that the linker keeps for the whole module.
#include "kernel_attention.h"
#include "kernel_matmul.h"
#include "kernel_row.h"
#include "kernel_sample.h"

namespace MS_NS {
extern const ms::Kernels table;
const ms::Kernels table = {
    MS_NAME,    to_float, from_float, encode_line,   decode_line,     quantize_rows,    matmul,         rms_norm, rope,
    act_mul,    add,      scale,      attention,     attention_merge, attention_finish, dequantize_row,
    edit_logits, argmax,     draw_token,
};
}  // namespace MS_NS
