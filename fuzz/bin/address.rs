//! See [`ambit_fuzz::address`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ambit_fuzz::address(data));
