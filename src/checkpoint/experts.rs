//! Experts of a layer in one tensor: whether their matrices can be taken out again.
//!
//! A tensor `[experts, rows, columns]` is quantized as one, under its own name. Who loads it takes
//! matrices out as they are, which needs two things: a row is the weights of one output, as in a
//! linear layer, and no block of elements with a common scale lies across two matrices.

use std::collections::HashSet;

use serde_json::Value;

use crate::checkpoint::names::module_of;
use crate::checkpoint::safetensors::TensorInfo;
use crate::format::Scale;
use crate::tensor::Layout;

/// Names of parameters that hold a projection of all experts, and the matrices of each expert.
const PARAMETERS: &[(&str, usize)] = &[("gate_up_proj", 2), ("up_proj", 1), ("down_proj", 1)];

/// The one whose rows are as many as the model's features; the columns of the others are.
const DOWN: &str = "down_proj";

/// Entries of a config that say how many features go through a layer's experts.
const HIDDEN: &[&str] = &["hidden_size", "moe_hidden_size"];

/// What to know about all experts of a model.
#[derive(Debug)]
pub struct Experts<'a> {
    inputs_first: HashSet<&'a str>,
}

impl<'a> Experts<'a> {
    /// Looks through all tensors for experts that are stored `[in, out]`; without a config that
    /// says how many features a model has, none are.
    pub fn new(config: Option<&Value>, tensors: impl IntoIterator<Item = &'a TensorInfo>) -> Self {
        let hidden = config.map(hidden_sizes).unwrap_or_default();
        let is_hidden = |size: usize| hidden.is_empty() || hidden.contains(&size);
        let inputs_first = tensors
            .into_iter()
            .filter_map(|info| {
                let (module, last) = module_of(&info.name).rsplit_once('.')?;
                let &[_, rows, columns] = info.shape.as_slice() else { return None };
                let outer = if last == DOWN { rows } else { columns };
                (!is_hidden(outer)).then_some(module)
            })
            .collect();
        Self { inputs_first }
    }

    /// Why a tensor of rank 3 must not be quantized with this layout, if so.
    pub fn obstacle(&self, info: &TensorInfo, layout: &Layout) -> Option<&'static str> {
        let &[_, rows, columns] = info.shape.as_slice() else { return None };
        let (module, last) = module_of(&info.name).rsplit_once('.')?;
        let Some((_, matrices)) = PARAMETERS.iter().find(|(name, _)| *name == last) else {
            return Some("experts in one tensor whose layout is not known");
        };
        if self.inputs_first.contains(module) {
            return Some(
                "experts stored [in, out] in one tensor (load the model to quantize them)",
            );
        }
        let by_rows = layout.format.spec().scale == Scale::RowAbsmax;
        let is_whole = rows.is_multiple_of(*matrices)
            && (by_rows || (rows / matrices * columns).is_multiple_of(layout.blocksize));
        (!is_whole).then_some("experts in one tensor whose matrices are not whole blocks")
    }
}

/// The numbers of features in a config and in the configs inside it.
fn hidden_sizes(config: &Value) -> Vec<usize> {
    let inner = config.as_object().into_iter().flatten().map(|(_, value)| value);
    std::iter::once(config)
        .chain(inner)
        .flat_map(|config| HIDDEN.iter().filter_map(|key| config.get(key)?.as_u64()))
        .filter_map(|size| usize::try_from(size).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use ::safetensors::Dtype;

    use super::*;
    use crate::format::Format;

    fn obstacle(config: &str, name: &str, shape: &[usize], format: Format) -> Option<&'static str> {
        let info = |name: &str, shape: &[usize]| TensorInfo {
            name: name.to_owned(),
            dtype: Dtype::BF16,
            shape: shape.to_vec(),
            offset: 0,
            bytes: 0,
        };
        // Square, so that only the other parameter of the module tells how it lies.
        let (this, square) = (info(name, shape), info("m.experts.down_proj", &[2, 64, 64]));
        let config = serde_json::from_str(config).ok();
        let layout = Layout::new(format, shape, None, false).unwrap();
        Experts::new(config.as_ref(), [&this, &square]).obstacle(&this, &layout)
    }

    #[test]
    fn matrices_that_can_be_taken_out_have_no_obstacle() {
        let config = r#"{"text_config": {"hidden_size": 64}}"#;
        let gate_up = "m.experts.gate_up_proj";
        assert_eq!(obstacle(config, gate_up, &[2, 96, 64], Format::Nf4), None);
        assert_eq!(obstacle("{}", gate_up, &[2, 64, 96], Format::Nf4), None);
        assert_eq!(obstacle(config, "m.experts.down_proj", &[2, 64, 96], Format::Int8), None);
        let transposed = obstacle(config, gate_up, &[2, 64, 96], Format::Nf4);
        assert!(transposed.is_some_and(|reason| reason.contains("[in, out]")));
        let unknown = obstacle(config, "m.experts.w13_weight", &[2, 96, 64], Format::Nf4);
        assert!(unknown.is_some_and(|reason| reason.contains("not known")));
    }

    #[test]
    fn a_block_across_two_matrices_is_an_obstacle_but_rows_are_whole() {
        let gate_up = "m.experts.gate_up_proj";
        let shape = [2, 6, 32]; // three rows each: a block and a half
        assert!(obstacle("{}", gate_up, &shape, Format::Nf4).is_some());
        assert_eq!(obstacle("{}", gate_up, &shape, Format::Mxfp4), None); // blocks of 32
        assert_eq!(obstacle("{}", gate_up, &shape, Format::Int8), None);
    }

    #[test]
    fn one_parameter_tells_how_all_of_its_module_lie() {
        let config = serde_json::from_str(r#"{"hidden_size": 64}"#).unwrap();
        let info = |name: &str, shape: &[usize]| TensorInfo {
            name: name.to_owned(),
            dtype: Dtype::BF16,
            shape: shape.to_vec(),
            offset: 0,
            bytes: 0,
        };
        let gate_up = info("m.experts.gate_up_proj", &[2, 64, 128]);
        let down = info("m.experts.down_proj", &[2, 64, 64]);
        let layout = Layout::new(Format::Nf4, &down.shape, None, false).unwrap();
        let experts = Experts::new(Some(&config), [&gate_up, &down]);
        assert!(experts.obstacle(&down, &layout).is_some());
    }
}
