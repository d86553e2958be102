//! `src/gen` is what prost makes of `proto/`: checked in, so that no build needs a protobuf compiler.
//! `AMBIT_WRITE_GENERATED=1 cargo test -p xds --test generated` writes it anew.

use std::path::Path;

const PROTOS: [&str; 6] = [
    "workload.proto",
    "authorization.proto",
    "discovery.proto",
    "ca.proto",
    "zds.proto",
    "ambit.proto",
];

#[test]
fn generated_code_is_current() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let descriptors = protox::compile(PROTOS, [root.join("proto")]).unwrap();
    let out = tempfile::tempdir().unwrap();
    prost_build::Config::new()
        .out_dir(out.path())
        // One order of map entries: equal messages have equal bytes.
        .btree_map(["."])
        // Resources travel without a copy from the encoder to every connection.
        .bytes(["."])
        .extern_path(".google.protobuf.Any", "crate::any::Any")
        .compile_fds(descriptors)
        .unwrap();
    let checked_in = root.join("src/gen");
    let write = std::env::var_os("AMBIT_WRITE_GENERATED").is_some();
    let mut seen = 0;
    for entry in std::fs::read_dir(out.path()).unwrap() {
        let path = entry.unwrap().path();
        let target = checked_in.join(path.file_name().unwrap());
        let want = std::fs::read_to_string(&path).unwrap();
        if write {
            std::fs::write(&target, &want).unwrap();
        }
        let have = std::fs::read_to_string(&target).unwrap_or_default();
        assert!(want == have, "{} is not what proto/ says", target.display());
        seen += 1;
    }
    assert_eq!(seen, PROTOS.len());
}
