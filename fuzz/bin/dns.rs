//! See [`ambit_fuzz::dns`].
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ambit_fuzz::dns(data));
