//! The structs that kernels take have the same bytes in Rust and in C.

// Helpers outside of test functions.
#![allow(clippy::unwrap_used)]

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Command;

use nybble::backend::cuda::params::layouts;

/// A C program that asserts every size and offset when it is compiled.
fn assertions() -> String {
    let mut text = "#include <stddef.h>\n#include \"params.h\"\n".to_owned();
    for (name, size, fields) in layouts() {
        let _ = writeln!(text, "_Static_assert(sizeof({name}) == {size}, \"{name}\");");
        for (field, offset) in fields {
            let _ = writeln!(
                text,
                "_Static_assert(offsetof({name}, {field}) == {offset}, \"{name}.{field}\");"
            );
        }
    }
    text
}

fn compiles(text: &str) -> bool {
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("layout.c");
    fs::write(&source, text).unwrap();
    let headers = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let object = directory.path().join("layout.o");
    let done = Command::new("cc")
        .arg("-c")
        .arg(&source)
        .arg("-o")
        .arg(object)
        .arg("-I")
        .arg(headers)
        .output();
    // rustc links with the same compiler.
    let done = done.unwrap();
    done.status.success()
}

#[test]
#[cfg(unix)]
fn structs_of_kernels_have_the_layout_of_the_header() {
    let text = assertions();
    assert!(text.matches("offsetof").count() > 80, "{text}");
    assert!(compiles(&text), "{text}");
    // The compiler does see a difference.
    assert!(!compiles(&text.replace("offsetof(Linear4, y) == 24", "offsetof(Linear4, y) == 32")));
}

/// Every field of the header is mirrored, so nothing at the end of a struct is left out.
#[test]
fn the_header_has_no_struct_that_is_not_mirrored() {
    let header = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda/params.h");
    let header = fs::read_to_string(header).unwrap();
    let structs: Vec<_> =
        header.lines().filter_map(|line| line.strip_prefix("} ")?.strip_suffix(';')).collect();
    let ours: Vec<_> = layouts().into_iter().map(|(name, ..)| name).collect();
    assert_eq!(structs, ours);
}
