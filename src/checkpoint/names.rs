//! Which tensors of a checkpoint are weights of linear layers, told by name, shape and dtype.
//!
//! transformers decides by building the model: every module that is exactly `nn.Linear`, less
//! the output head. Here only headers are read, so the names decide, with `config.json`'s
//! `model_type` where a name alone would mislead. What is not surely a linear layer stays as it
//! is: a weight left in 16 bits costs memory, an embedding in 4 bits does not load.

use std::collections::HashSet;

use ::safetensors::Dtype;
use serde_json::Value;

use crate::checkpoint::safetensors::TensorInfo;

/// What a tensor is to quantization.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The weight of a linear layer.
    Linear,
    /// The weight of a linear layer that makes logits: left out unless the user has a list.
    Head,
    /// A linear layer of a mixture of experts, or all experts' layers in one tensor.
    Expert,
    /// The linear layer that chooses experts: tiny, and its errors change which expert is asked.
    Router,
    /// Anything else, and why.
    Other(&'static str),
    /// A linear layer that must keep its precision: float32 where the rest is float16.
    KeepPrecise(&'static str),
}

/// What to know about a model beyond single names.
#[derive(Debug)]
pub struct Names<'a> {
    conv1d: bool,
    precise: Vec<&'static str>,
    float32: Vec<&'static str>,
    has_own_layers: bool,
    attention_in: HashSet<&'a str>,
    biased: HashSet<&'a str>,
}

/// Model types whose linear layers are `Conv1D`, with the weight stored as `[in, out]`.
const CONV1D_MODELS: &[&str] = &["gpt2", "openai-gpt", "imagegpt", "decision_transformer"];

/// The layers of those models that are `Conv1D`.
const CONV1D_LAYERS: &[&str] = &["c_attn", "c_proj", "c_fc", "q_attn"];

/// Modules that transformers keeps precise (`_keep_in_fp32_modules`) and the model types that
/// have them; no types: any.
const PRECISE: &[(&str, &[&str])] = &[
    ("wo", &["t5", "mt5", "umt5", "udop", "pop2piano"]),
    ("qformer", &["blip-2"]),
    (
        "indexer.weights_proj",
        &["axk2", "deepseek_v32", "deepseek_v4", "glm_moe_dsa", "mistral_large4"],
    ),
];

/// Ends of tensors that transformers keeps in float32 whatever the model's type is
/// (`_keep_in_fp32_modules_strict`), and the model types that have them; no types: any.
const FLOAT32: &[(&str, &[&str])] = &[
    (".e_score_correction_bias", &[]),
    (".gate.weight", &["ernie4_5_moe", "ernie4_5_vl_moe", "flint", "beam", "mistral_large4"]),
];

/// Model types whose layers are classes of their own, which bitsandbytes does not replace.
const OWN_LAYERS: &[&str] = &["falcon", "ibert"];

/// Last components of linear layers that make logits.
const HEADS: &[&str] = &["lm_head", "embed_out", "output_projection", "score"];

/// Names of linear layers that make logits, where the last component says too little.
const WHOLE_HEADS: &[&str] = &["output", "head"];

/// Ends of such names.
const HEAD_ENDS: &[&str] = &["head.decoder", "predictions.decoder", "_lm_head"];

/// Last components of embeddings.
const EMBEDDINGS: &[&str] = &[
    "bias_values",
    "embed",
    "embed_char",
    "embed_global",
    "embed_in",
    "embed_timestep",
    "embedding",
    "embeddings",
    "relative_attention_bias",
    "shared",
    "tok_embeddings",
    "w",
    "wpe",
    "wte",
];

/// Beginnings of last components of embeddings.
const EMBEDDING_STARTS: &[&str] =
    &["embed_tokens", "embed_positions", "token_type_embeddings", "HashBucketCodepointEmbedder"];

/// Ends of last components of embeddings.
const EMBEDDING_ENDS: &[&str] = &[
    "_embedding",
    "_embeddings",
    "_embed",
    "_embeds",
    "_embeds_layer",
    "_embedder",
    "_emb",
    "_embedding_table",
    "_embeddings_table",
    "_token",
    "_tokens",
];

/// What is named like an embedding but is a linear layer, mostly over the pixels of a patch.
const NO_EMBEDDINGS: &[&str] = &[
    "box_linear_embeddings",
    "patch_embed",
    "patch_embedding",
    "patch_embeddings",
    "relative_pos_embeddings",
    "vision_embed_tokens",
    "xpath_unitseq2_embeddings",
];

impl<'a> Names<'a> {
    /// Looks through the names of all tensors, and through the config if there is one.
    pub fn new(config: Option<&Value>, tensors: impl IntoIterator<Item = &'a TensorInfo>) -> Self {
        let types = config.map(model_types);
        let is_one_of = |table: &[&str]| {
            types.as_ref().map(|types| types.iter().any(|name| table.contains(name)))
        };
        let of_model = |table: &[(&'static str, &[&str])]| {
            let applies = |types: &[&str]| types.is_empty() || is_one_of(types).unwrap_or(false);
            let rows = table.iter().filter(|(_, types)| applies(types));
            rows.map(|(name, _)| *name).collect()
        };
        let (mut attention_in, mut biased, mut wide) = (HashSet::new(), HashSet::new(), false);
        for info in tensors {
            if let Some(parent) = info.name.strip_suffix(".in_proj_weight") {
                attention_in.insert(parent);
            }
            if let Some(module) = info.name.strip_suffix(".bias") {
                biased.insert(module);
            }
            // Without a config: queries, keys and values side by side tell `[in, out]`.
            wide |= info.name.ends_with("attn.c_attn.weight")
                && matches!(*info.shape, [rows, columns] if Some(columns) == rows.checked_mul(3));
        }
        Self {
            conv1d: is_one_of(CONV1D_MODELS).unwrap_or(wide),
            precise: of_model(PRECISE),
            float32: of_model(FLOAT32),
            has_own_layers: is_one_of(OWN_LAYERS).unwrap_or(false),
            attention_in,
            biased,
        }
    }

    /// What a tensor is.
    pub fn role(&self, info: &TensorInfo) -> Role {
        if !is_float(info.dtype) {
            return Role::Other("not floating point");
        }
        if info.name.split('.').any(|component| component == "experts") {
            return expert(info);
        }
        let Some(module) = info.name.strip_suffix(".weight") else {
            return Role::Other(if info.shape.len() < 2 {
                "one-dimensional"
            } else {
                "not the weight of a module"
            });
        };
        match info.shape.len() {
            0 | 1 => return Role::Other("one-dimensional"),
            2 => {}
            _ => return Role::Other("more than two dimensions"),
        }
        let (parent, last) = module.rsplit_once('.').unwrap_or(("", module));
        if self.is_head(module, last) {
            return quantizable(info, Role::Head);
        }
        if is_embedding(last) {
            return Role::Other("embedding");
        }
        if is_norm(last) {
            return Role::Other("norm");
        }
        if is_router(module, last) {
            return Role::Router;
        }
        if last == "out_proj" && self.attention_in.contains(parent) {
            return Role::Other("part of torch's MultiheadAttention");
        }
        if self.precise.iter().any(|name| at_border(name, module)) {
            return Role::KeepPrecise("kept precise by its model");
        }
        quantizable(info, Role::Linear)
    }

    /// transformers leaves out the output embedding and the last parameter: a classifier's weight
    /// only if it has no bias behind it.
    fn is_head(&self, module: &str, last: &str) -> bool {
        HEADS.contains(&last)
            || WHOLE_HEADS.contains(&module)
            || HEAD_ENDS.iter().any(|end| module.ends_with(end))
            || (last == "classifier" && !module.contains("router") && !self.biased.contains(module))
    }

    /// Whether a tensor is float32 even in a model that is cast to less.
    pub fn is_float32(&self, tensor: &str) -> bool {
        self.float32.iter().any(|end| tensor.ends_with(end))
    }

    /// Whether transformers cannot load this model with quantized layers.
    pub const fn has_own_layers(&self) -> bool {
        self.has_own_layers
    }

    /// Whether the weight of a module is stored as `[in, out]`.
    pub fn is_transposed(&self, module: &str) -> bool {
        self.conv1d && CONV1D_LAYERS.contains(&last_component(module))
    }
}

/// Whether transformers takes a layer that is left out by default for one to quantize, so that
/// the config must say that it is not. Where experts are one tensor, they and their gate are no
/// `nn.Linear`; in some older models they are.
pub fn must_be_named(module: &str, role: Role) -> bool {
    match role {
        Role::Router => module.split('.').any(|component| component == "router"),
        Role::Expert => module.contains(".experts.expert_"),
        Role::Linear | Role::Head | Role::KeepPrecise(_) | Role::Other(_) => false,
    }
}

/// The name of the module that a tensor belongs to; fused experts are parameters and have none.
pub fn module_of(tensor: &str) -> &str {
    tensor.strip_suffix(".weight").unwrap_or(tensor)
}

/// `model_type` of the config and of the configs inside it (an encoder and a decoder, or text
/// and vision).
fn model_types(config: &Value) -> Vec<&str> {
    let own = config.get("model_type");
    let inner = config.as_object().into_iter().flatten().filter_map(|(_, v)| v.get("model_type"));
    own.into_iter().chain(inner).filter_map(Value::as_str).collect()
}

const fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16 | Dtype::F64)
}

fn quantizable(info: &TensorInfo, role: Role) -> Role {
    match info.dtype {
        Dtype::F64 => Role::Other("float64 cannot be quantized, store it as float32 first"),
        _ => role,
    }
}

/// Experts are one linear layer each (`experts.3.w1.weight`) or one tensor of rank 3 for all.
fn expert(info: &TensorInfo) -> Role {
    let last = last_component(module_of(&info.name));
    match info.shape.len() {
        2 if info.name.ends_with(".weight") && !is_norm(last) => quantizable(info, Role::Expert),
        3 if !last.contains("bias") && !last.contains("scale") => quantizable(info, Role::Expert),
        2 => Role::Other("not the weight of a module"),
        _ => Role::Other("one-dimensional"),
    }
}

fn is_embedding(last: &str) -> bool {
    !NO_EMBEDDINGS.contains(&last)
        && (EMBEDDINGS.contains(&last)
            || EMBEDDING_STARTS.iter().any(|start| last.starts_with(start))
            || EMBEDDING_ENDS.iter().any(|end| last.ends_with(end)))
}

/// Whether `name` is the beginning or the end of a module's name, cut at dots.
fn at_border(name: &str, module: &str) -> bool {
    let cut = |rest: Option<&str>, dot: &str| {
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with(dot) || rest.ends_with(dot))
    };
    cut(module.strip_prefix(name), ".") || cut(module.strip_suffix(name), ".")
}

fn is_norm(last: &str) -> bool {
    let last = last.to_ascii_lowercase();
    last.contains("norm") || last.starts_with("ln_")
}

fn is_router(module: &str, last: &str) -> bool {
    last == "gate" || module.split('.').any(|component| component == "router")
}

fn last_component(module: &str) -> &str {
    module.rsplit_once('.').map_or(module, |(_, last)| last)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(name: &str, shape: &[usize]) -> TensorInfo {
        TensorInfo {
            name: name.to_owned(),
            dtype: Dtype::BF16,
            shape: shape.to_vec(),
            offset: 0,
            bytes: 0,
        }
    }

    fn role(config: &str, name: &str, shape: &[usize]) -> Role {
        let config = serde_json::from_str(config).ok();
        Names::new(config.as_ref(), []).role(&info(name, shape))
    }

    #[test]
    fn linear_layers_are_told_from_what_looks_like_them() {
        for (name, want) in [
            ("model.layers.0.self_attn.q_proj.weight", Role::Linear),
            ("model.layers.0.mlp.gate_proj.weight", Role::Linear),
            ("model.layers.0.mlp.shared_expert_gate.weight", Role::Linear),
            ("model.layers.0.mlp.shared_experts.up_proj.weight", Role::Linear),
            ("lm_head.dense.weight", Role::Linear),
            ("encoder.embedding_hidden_mapping_in.weight", Role::Linear),
            ("lm_head.weight", Role::Head),
            ("embed_out.weight", Role::Head),
            ("classifier.weight", Role::Head),
            ("head.weight", Role::Head),
            ("block.head.weight", Role::Linear),
            ("vision.embeddings.patch_embedding.weight", Role::Linear),
            ("cls.predictions.decoder.weight", Role::Head),
            ("model.embed_tokens.weight", Role::Other("embedding")),
            ("transformer.wpe.weight", Role::Other("embedding")),
            ("bert.embeddings.token_type_embeddings.weight", Role::Other("embedding")),
            (
                "block.0.layer.0.SelfAttention.relative_attention_bias.weight",
                Role::Other("embedding"),
            ),
            ("model.layers.0.block_sparse_moe.gate.weight", Role::Router),
            ("encoder.block.1.mlp.router.classifier.weight", Role::Router),
            ("model.layers.0.mlp.experts.3.up_proj.weight", Role::Expert),
            ("some.parameter", Role::Other("not the weight of a module")),
        ] {
            assert_eq!(role("{}", name, &[8, 8]), want, "{name}");
        }
        assert_eq!(role("{}", "model.norm.weight", &[8]), Role::Other("one-dimensional"));
        assert_eq!(
            role("{}", "patch.proj.weight", &[8, 3, 2, 2]),
            Role::Other("more than two dimensions")
        );
    }

    #[test]
    fn fused_experts_are_one_tensor_of_rank_three() {
        let fused = "model.layers.0.mlp.experts.gate_up_proj";
        assert_eq!(role("{}", fused, &[4, 8, 8]), Role::Expert);
        assert_ne!(role("{}", &format!("{fused}_bias"), &[4, 8]), Role::Expert);
        assert_ne!(role("{}", &format!("{fused}_bias"), &[4, 8, 1]), Role::Expert);
    }

    #[test]
    fn the_model_type_decides_about_wo_and_conv1d() {
        let wo = "encoder.block.0.layer.1.DenseReluDense.wo.weight";
        assert_eq!(role(r#"{"model_type":"llama"}"#, wo, &[8, 8]), Role::Linear);
        let indexer = "layers.0.indexer.weights_proj.weight";
        assert_eq!(role("{}", indexer, &[8, 8]), Role::Linear);
        let deepseek = r#"{"model_type":"deepseek_v32"}"#;
        assert!(matches!(role(deepseek, indexer, &[8, 8]), Role::KeepPrecise(_)));
        let t5 = r#"{"model_type":"t5"}"#;
        assert!(matches!(role(t5, wo, &[8, 8]), Role::KeepPrecise(_)));
        let inner = r#"{"model_type":"blip-2","text_config":{"model_type":"t5"}}"#;
        assert!(matches!(role(inner, wo, &[8, 8]), Role::KeepPrecise(_)));

        let transposed = |config: Option<&str>, tensors: &[TensorInfo]| {
            let config = config.map(|text| serde_json::from_str(text).unwrap());
            Names::new(config.as_ref(), tensors).is_transposed("h.0.attn.c_attn")
        };
        assert!(transposed(Some(r#"{"model_type":"gpt2"}"#), &[]));
        assert!(!transposed(Some(r#"{"model_type":"gpt_bigcode"}"#), &[]));
        assert!(transposed(None, &[info("h.0.attn.c_attn.weight", &[8, 24])]));
        assert!(!transposed(None, &[info("h.0.attn.c_attn.weight", &[24, 8])]));
    }

    #[test]
    fn the_bias_of_a_router_stays_float32() {
        let config = serde_json::json!({ "model_type": "flint" });
        let names = Names::new(Some(&config), []);
        assert!(names.is_float32("model.layers.1.mlp.gate.e_score_correction_bias"));
        assert!(names.is_float32("model.layers.1.mlp.gate.weight"));
        assert!(!Names::new(None, []).is_float32("model.layers.1.mlp.gate.weight"));
    }

    #[test]
    fn a_classifier_with_a_bias_is_a_layer_like_others() {
        let tensors = [info("classifier.bias", &[8])];
        let names = Names::new(None, &tensors);
        assert_eq!(names.role(&info("classifier.weight", &[8, 8])), Role::Linear);
    }

    #[test]
    fn the_output_projection_of_a_multihead_attention_is_no_plain_linear() {
        let tensors = [info("head.attention.in_proj_weight", &[24, 8])];
        let names = Names::new(None, &tensors);
        let role = |name: &str| names.role(&info(name, &[8, 8]));
        assert!(matches!(role("head.attention.out_proj.weight"), Role::Other(_)));
        assert_eq!(role("layers.0.attention.out_proj.weight"), Role::Linear);
    }
}
