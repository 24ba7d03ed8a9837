//! Compiles the `.proto` files with protox, so that no `protoc` has to be installed.

fn main() {
    let files = ["proto/inference.proto", "proto/control.proto", "proto/feature.proto", "proto/drill.proto"];
    for file in files {
        println!("cargo::rerun-if-changed={file}");
    }
    let descriptors = protox::compile(files, ["proto"]).expect("the .proto files of this crate compile");
    tonic_prost_build::configure()
        // Tensor bytes stay slices of the message they arrived in.
        .bytes(".inference.ModelInferRequest.raw_input_contents")
        .bytes(".inference.ModelInferResponse.raw_output_contents")
        .bytes(".inference.InferTensorContents.bytes_contents")
        .bytes(".spillway.feature.v1")
        .bytes(".spillway.control.v1")
        .compile_fds(descriptors)
        .expect("the descriptors of this crate generate");
}
