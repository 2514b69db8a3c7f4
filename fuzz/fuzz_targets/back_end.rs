//! libFuzzer's way to the target of this name; what it does and what must hold is written there.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| resilver_tests::fuzz::back_end(data));
