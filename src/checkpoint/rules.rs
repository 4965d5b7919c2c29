//! Which modules a user leaves out, and which get another format than the rest.
//!
//! A pattern is plain text, a glob with `*` and `?`, or `re:` and a regular expression:
//!
//! | pattern | matches the module name when it equals |
//! |---|---|
//! | `lm_head` | the whole name, its beginning up to a dot, or its end |
//! | `model.layers.*.mlp` | the whole name, its beginning up to a dot, or its end from a dot |
//! | `re:layers\.[01]\.` | any part of the name |
//!
//! Plain text means what transformers' `llm_int8_skip_modules` means, so `head` also leaves out
//! `lm_head`. A `.weight` at the end of a plain pattern or glob is ignored.

use std::sync::atomic::{AtomicBool, Ordering};

use regex::Regex;

use crate::error::{Error, Result};
use crate::format::Format;

/// The word in place of a format that leaves a module as it is.
pub const SKIP: &str = "skip";

/// One pattern, and whether it has matched anything yet.
#[derive(Debug)]
pub struct Pattern {
    text: String,
    regex: Regex,
    used: AtomicBool,
}

impl Pattern {
    /// Compiles a pattern.
    pub fn new(text: &str) -> Result<Self> {
        let (body, is_regex) = match text.strip_prefix("re:") {
            Some(regex) => (regex, true),
            None => (text.strip_suffix(".weight").unwrap_or(text), false),
        };
        if body.is_empty() {
            return Err(Error::Argument {
                what: "a pattern",
                got: text.to_owned(),
                expected: "it would match every module; name one, or write '*'".to_owned(),
            });
        }
        let regex = if is_regex { body.to_owned() } else { translate(body) };
        let regex = Regex::new(&regex).map_err(|error| Error::Pattern {
            pattern: text.to_owned(),
            reason: error.to_string(),
        })?;
        Ok(Self { text: text.to_owned(), regex, used: AtomicBool::new(false) })
    }

    /// The pattern as given.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether this pattern matches a module name.
    ///
    /// ```
    /// use nybble::checkpoint::rules::Pattern;
    /// let pattern = Pattern::new("model.layers.1")?;
    /// assert!(pattern.matches("model.layers.1.mlp.up_proj"));
    /// assert!(!pattern.matches("model.layers.11.mlp.up_proj"));
    /// # Ok::<(), nybble::error::Error>(())
    /// ```
    pub fn matches(&self, module: &str) -> bool {
        let found = self.regex.is_match(module);
        if found {
            self.used.store(true, Ordering::Relaxed);
        }
        found
    }
}

/// The regular expression of plain text or of a glob.
fn translate(text: &str) -> String {
    let is_glob = text.contains(['*', '?']);
    let body: String = text
        .chars()
        .map(|c| match c {
            '*' => ".*".to_owned(),
            '?' => ".".to_owned(),
            c => regex::escape(c.encode_utf8(&mut [0; 4])),
        })
        .collect();
    // Like transformers, text that ends in a dot is at a border already.
    let border = if text.ends_with('.') { "" } else { r"(?:\.|$)" };
    let end = if is_glob { r"(?:^|\.)" } else { "" };
    format!("^(?:{body}){border}|{end}(?:{body})$")
}

/// What the rules say about a module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision<'a> {
    /// Nothing.
    Default,
    /// Leave it as it is; the pattern that says so.
    Skip(&'a str),
    /// Store it in this format, which may be a dense one; the pattern that says so.
    Format(Format, &'a str),
}

/// The user's rules. A skip pattern wins over every override; among overrides the first that
/// matches wins.
#[derive(Debug, Default)]
pub struct Rules {
    skip: Vec<Pattern>,
    overrides: Vec<(Pattern, Option<Format>)>,
}

impl Rules {
    /// Compiles the patterns. An override's value is the name of a format or `skip`.
    pub fn new<S: AsRef<str>, O: AsRef<str>>(skip: &[S], overrides: &[(O, O)]) -> Result<Self> {
        let skip = skip.iter().map(|text| Pattern::new(text.as_ref())).collect::<Result<_>>()?;
        let overrides = overrides
            .iter()
            .map(|(text, value)| {
                let format = match value.as_ref() {
                    SKIP => None,
                    name => Some(Format::parse(name)?),
                };
                Ok((Pattern::new(text.as_ref())?, format))
            })
            .collect::<Result<_>>()?;
        Ok(Self { skip, overrides })
    }

    /// What becomes of a module.
    ///
    /// ```
    /// use nybble::checkpoint::rules::{Decision, Rules};
    /// use nybble::format::Format;
    /// let rules = Rules::new(&["lm_head"], &[("re:layers\\.0\\.", "int8")])?;
    /// assert_eq!(rules.decide("lm_head"), Decision::Skip("lm_head"));
    /// let first = rules.decide("model.layers.0.mlp.up_proj");
    /// assert_eq!(first, Decision::Format(Format::Int8, "re:layers\\.0\\."));
    /// assert_eq!(rules.decide("model.layers.1.mlp.up_proj"), Decision::Default);
    /// # Ok::<(), nybble::error::Error>(())
    /// ```
    pub fn decide(&self, module: &str) -> Decision<'_> {
        // Every pattern is asked, so that `unused` does not name one that only came second.
        let mut decision = Decision::Default;
        for (pattern, format) in &self.overrides {
            if pattern.matches(module) && decision == Decision::Default {
                decision = match format {
                    Some(format) => Decision::Format(*format, pattern.text()),
                    None => Decision::Skip(pattern.text()),
                };
            }
        }
        let mut skips = self.skip.iter().filter(|pattern| pattern.matches(module));
        let first = skips.next();
        skips.for_each(drop);
        first.map_or(decision, |pattern| Decision::Skip(pattern.text()))
    }

    /// The patterns that have matched nothing so far.
    pub fn unused(&self) -> Vec<String> {
        self.skip
            .iter()
            .chain(self.overrides.iter().map(|(pattern, _)| pattern))
            .filter(|pattern| !pattern.used.load(Ordering::Relaxed))
            .map(|pattern| pattern.text.clone())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matches(pattern: &str, module: &str) -> bool {
        Pattern::new(pattern).unwrap().matches(module)
    }

    #[test]
    fn plain_text_matches_as_transformers_does() {
        for (pattern, module, want) in [
            ("lm_head", "lm_head", true),
            ("head", "lm_head", true),
            ("layers.1", "layers.1.mlp", true),
            ("layers.1", "layers.11.mlp", false),
            ("layers.1.", "layers.1.mlp", true),
            ("layers.1", "model.layers.1", true),
            ("layers.1", "model.layers.1.mlp", false),
            ("fc1", "model.decoder.layers.23.fc1", true),
            ("fc1", "model.fc1.dense", false),
            ("mlp.gate", "mlp.gate_proj", false),
            ("a.b", "aXb", false),
            ("lm_head.weight", "lm_head", true),
        ] {
            assert_eq!(matches(pattern, module), want, "{pattern} {module}");
        }
    }

    #[test]
    fn globs_match_whole_names_beginnings_and_ends_at_dots() {
        for (pattern, module, want) in [
            ("*", "anything.at.all", true),
            ("model.layers.*.mlp", "model.layers.3.mlp.up_proj", true),
            ("model.layers.?.mlp", "model.layers.13.mlp.up_proj", false),
            ("*.k_proj", "model.layers.0.self_attn.k_proj", true),
            ("mlp.*", "model.layers.0.mlp.up_proj", true),
            ("q_*", "model.layers.0.self_attn.q_proj", true),
            ("_pro?", "model.layers.0.self_attn.q_proj", false),
        ] {
            assert_eq!(matches(pattern, module), want, "{pattern} {module}");
        }
    }

    #[test]
    fn regular_expressions_search() {
        assert!(matches(r"re:layers\.[01]\.", "model.layers.1.mlp"));
        assert!(!matches(r"re:^layers", "model.layers.1.mlp"));
        assert!(matches!(Pattern::new("re:("), Err(Error::Pattern { .. })));
    }

    #[test]
    fn a_pattern_that_says_nothing_is_refused() {
        assert!(Pattern::new("").is_err());
        assert!(Pattern::new("re:").is_err());
        assert!(Pattern::new(".weight").is_err());
    }

    #[test]
    fn skip_wins_and_the_first_override_wins() {
        let overrides = [("*.up_proj", "int8"), ("*", "fp4"), ("mlp.*", "skip")];
        let rules = Rules::new(&["layers.0"], &overrides).unwrap();
        assert_eq!(rules.decide("layers.0.mlp.up_proj"), Decision::Skip("layers.0"));
        assert_eq!(rules.decide("layers.1.up_proj"), Decision::Format(Format::Int8, "*.up_proj"));
        assert_eq!(rules.decide("layers.1.mlp.down"), Decision::Format(Format::Fp4, "*"));
        let rules = Rules::new::<&str, _>(&[], &[("fc", "skip"), ("fc", "bf16")]).unwrap();
        assert_eq!(rules.decide("fc"), Decision::Skip("fc"));
        assert!(Rules::new::<&str, _>(&[], &[("fc", "nf5")]).is_err());
    }

    #[test]
    fn only_patterns_that_matched_nothing_are_unused() {
        let rules = Rules::new(&["lm_head", "nope"], &[("fc", "int8"), ("f?", "nf4")]).unwrap();
        rules.decide("lm_head");
        rules.decide("fc");
        assert_eq!(rules.unused(), ["nope"]);
    }
}
