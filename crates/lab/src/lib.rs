//! The local world: nodes and pods from network namespaces.
