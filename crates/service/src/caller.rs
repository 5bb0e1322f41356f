//! Who makes a call, as the kernel knows it.

/// The user behind a connection within this host. It travels in the extensions of a request, which never leave the
/// process: nobody can send one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    /// The user's id.
    pub uid: u32,
    /// How the call came.
    pub door: Door,
    /// The secret that callers have to know was shown already, by the connection as a whole.
    pub proven: bool,
}

/// How a call came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Door {
    /// On the port of gRPC.
    Grpc,
    /// On the JSON-line control plane.
    JsonLine,
}

impl Door {
    /// Its name in logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Grpc => "grpc",
            Self::JsonLine => "json-line",
        }
    }
}

impl Caller {
    /// The daemon itself, which asks on nobody's behalf.
    pub fn own(door: Door) -> Self {
        Self { uid: rustix::process::geteuid().as_raw(), door, proven: true }
    }

    /// A request that says who makes it.
    pub fn request<T>(self, message: T) -> tonic::Request<T> {
        let mut request = tonic::Request::new(message);
        request.extensions_mut().insert(self);
        request
    }
}
