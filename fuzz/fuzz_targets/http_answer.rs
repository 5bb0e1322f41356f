#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| drover_fuzz::network::http_answer(data));
