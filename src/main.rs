//! The resilver binary: being built.
fn main() {}
