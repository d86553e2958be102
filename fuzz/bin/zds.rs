//! See [`ambit_fuzz::zds`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ambit_fuzz::zds(data));
