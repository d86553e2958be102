//! `google.protobuf.Any` with a shared buffer, so that one encoded resource serves every connection.

use bytes::Bytes;

/// Wire-compatible with `google.protobuf.Any`.
#[derive(Clone, PartialEq, Eq, Hash, prost::Message)]
pub struct Any {
    #[prost(string, tag = "1")]
    pub type_url: String,
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}
