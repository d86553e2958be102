//! SPIFFE mTLS and HTTP/2 CONNECT: client, server, pool.
