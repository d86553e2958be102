//! The one gRPC method: a message in, what was seen out. Framing by hand: it is five bytes.

use anyhow::{Context, Result, ensure};
use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

/// The method's path; the names are those of the application that the conformance suite uses.
pub const METHOD: &str = "/proto.EchoTestService/Echo";
pub const CONTENT_TYPE: &str = "application/grpc";

/// Largest message read: an answer holds the request's headers, which HTTP/2 limits to less.
pub const MESSAGE_LIMIT: usize = 1024 * 1024;

/// Status of a call that succeeded, and of one to a method that is not there.
pub const OK: u32 = 0;
pub const UNIMPLEMENTED: u32 = 12;
pub const INVALID_ARGUMENT: u32 = 3;

/// Both ways the same: field 1, a text.
#[derive(Clone, PartialEq, Eq, Message)]
pub struct Text {
    #[prost(string, tag = "1")]
    pub message: String,
}

/// One text with its head.
#[must_use]
pub fn frame(message: &str) -> Bytes {
    frame_bytes(&Text { message: message.to_owned() }.encode_to_vec())
}

/// One message with its head: not compressed, and its length.
#[must_use]
pub fn frame_bytes(message: &[u8]) -> Bytes {
    let mut out = BytesMut::with_capacity(5 + message.len());
    out.put_u8(0);
    // What we send is far below 4 GiB.
    out.put_u32(u32::try_from(message.len()).unwrap_or(u32::MAX));
    out.extend_from_slice(message);
    out.freeze()
}

/// The one message of a body.
pub fn unframe(body: &[u8]) -> Result<String> {
    ensure!(body.len() >= 5, "a gRPC message starts with five bytes, here are {}", body.len());
    let (head, message) = body.split_at(5);
    ensure!(head[0] == 0, "the gRPC message is compressed, which was not asked for");
    let length = u32::from_be_bytes([head[1], head[2], head[3], head[4]]);
    ensure!(
        usize::try_from(length).is_ok_and(|length| length == message.len()),
        "the gRPC message says it has {length} bytes and has {}",
        message.len()
    );
    Ok(Text::decode(message).context("the gRPC message is not an echo's")?.message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_framed_is_unframed() {
        for text in ["", "a", "Hostname=x\n"] {
            assert_eq!(unframe(&frame(text)).expect("our own frame is read"), text);
        }
    }

    #[test]
    fn broken_frames_are_refused() {
        for (body, says) in [
            (&b""[..], "five bytes"),
            (&[1, 0, 0, 0, 0], "compressed"),
            (&[0, 0, 0, 0, 9, 1], "has 9 bytes"),
            (&[0, 255, 255, 255, 255], "bytes and has 0"),
            (&[0, 0, 0, 0, 1, 0xff], "not an echo's"),
        ] {
            let error = format!("{:#}", unframe(body).expect_err("it is broken"));
            assert!(error.contains(says), "{body:?}: {error}");
        }
    }
}
