use super::*;
use model::*;
use proptest::prelude::*;
use prost::Message;
use std::net::IpAddr;
