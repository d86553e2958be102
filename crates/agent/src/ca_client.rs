//! Asks the control plane's CA for certificates.
//!
//! Under istiod-lite the proxy shows its own certificate; for its first one it shows the one-time token of its node.
//! Under Istio it shows its service account's token each time. Every request names the identity wanted
//! (`ImpersonatedIdentity`), as Istio's node proxies do.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use model::Identity;
use prost_types::Struct;
use prost_types::value::Kind;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;
use tonic::{Code, Request};
use tonic_prost::ProstCodec;
use xds::ca::{IstioCertificateRequest, IstioCertificateResponse};

use crate::channel::{self, ChannelError, ClientCertificate};
use crate::control_plane::{ControlPlane, Login};

/// Longest wait for one certificate: signing takes milliseconds, a CA that restarts seconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Something that signs certificate requests.
pub trait Issuer: Send + Sync {
    /// Returns the chain in PEM, leaf first and root last. `own` is the proxy's own valid certificate.
    fn issue(
        &self,
        identity: Identity,
        csr: String,
        own: Option<Arc<ClientCertificate>>,
    ) -> BoxFuture<'_, Result<Vec<String>, CaError>>;
}

/// Why there is no certificate. Only [`CaError::NoCredentials`] cannot heal by itself.
#[derive(Clone, Debug, thiserror::Error)]
pub enum CaError {
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("the CA refuses: {message} ({code:?})")]
    Refused { code: Code, message: String },
    #[error("the CA did not answer within {} s", CALL_TIMEOUT.as_secs())]
    Timeout,
    #[error(
        "this proxy has neither a valid certificate nor an unused node token; start it anew with a new token"
    )]
    NoCredentials,
    #[error("the CA's answer is not usable: {0}")]
    Answer(String),
}

/// The CA of the control plane.
pub struct CaClient {
    control_plane: Arc<ControlPlane>,
    /// One connection for all requests under one certificate (its serial).
    channel: tokio::sync::Mutex<Option<(String, Channel)>>,
    /// Until it was used.
    token: Mutex<Option<String>>,
}

impl std::fmt::Debug for CaClient {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CaClient")
            .field("control_plane", &self.control_plane)
            .finish_non_exhaustive()
    }
}

impl CaClient {
    pub fn new(control_plane: Arc<ControlPlane>) -> Self {
        let token = match &control_plane.login {
            Login::Certificate { bootstrap_token } => bootstrap_token.clone(),
            Login::Token(_) => None,
        };
        let token = Mutex::new(token);
        Self { control_plane, channel: tokio::sync::Mutex::default(), token }
    }

    async fn certificate(
        &self,
        identity: Identity,
        csr: String,
        own: Option<Arc<ClientCertificate>>,
    ) -> Result<Vec<String>, CaError> {
        let message = self.message(&identity, csr);
        if let Login::Token(_) = self.control_plane.login {
            // A connection for each: the CA's server would take pings on one that is idle for an attack, and a root that
            // was replaced counts from the next call on.
            let channel = channel::connect(&self.control_plane.ca, None).await?;
            return self.call(channel, message, None).await;
        }
        let itself = self.control_plane.own_identity().is_some_and(|own| own == identity);
        let token = if itself { self.lock_token().clone() } else { None };
        let refused = match own {
            Some(own) => match self.with_certificate(&own, message.clone()).await {
                // A CA that was set up anew does not know us: the token may help.
                Err(error) if token.is_some() && may_be_our_certificate(&error) => error,
                result => return result,
            },
            None => CaError::NoCredentials,
        };
        let token = token.ok_or(refused)?;
        let channel = channel::connect(&self.control_plane.ca, None).await?;
        let chain = self.call(channel, message, Some(&token)).await?;
        // The CA took it: it is worth nothing now.
        *self.lock_token() = None;
        Ok(chain)
    }

    async fn with_certificate(
        &self,
        own: &ClientCertificate,
        message: IstioCertificateRequest,
    ) -> Result<Vec<String>, CaError> {
        let channel = self.channel(own).await?;
        let result = self.call(channel, message, None).await;
        if let Err(
            CaError::Refused { code: Code::Unavailable | Code::Unknown, .. } | CaError::Timeout,
        ) = &result
        {
            // Perhaps the connection and not the CA: begin with a new one next time.
            *self.channel.lock().await = None;
        }
        result
    }

    async fn channel(&self, own: &ClientCertificate) -> Result<Channel, ChannelError> {
        let mut cached = self.channel.lock().await;
        if let Some((serial, channel)) = &*cached
            && *serial == own.serial
        {
            return Ok(channel.clone());
        }
        // The lock is held meanwhile: eight requests at once need one connection.
        let channel = channel::connect(&self.control_plane.ca, Some(own)).await?;
        *cached = Some((own.serial.clone(), channel.clone()));
        Ok(channel)
    }

    fn message(&self, identity: &Identity, csr: String) -> IstioCertificateRequest {
        let value = prost_types::Value { kind: Some(Kind::StringValue(identity.to_string())) };
        let metadata = Struct { fields: [(xds::IMPERSONATED_IDENTITY.to_owned(), value)].into() };
        let lifetime = self.control_plane.certificate_lifetime.as_secs();
        let validity_duration = i64::try_from(lifetime).unwrap_or(i64::MAX);
        IstioCertificateRequest { csr, validity_duration, metadata: Some(metadata) }
    }

    async fn call(
        &self,
        channel: Channel,
        message: IstioCertificateRequest,
        token: Option<&str>,
    ) -> Result<Vec<String>, CaError> {
        let mut request = Request::new(message);
        self.control_plane.sign_in(&self.control_plane.ca, request.metadata_mut())?;
        if let Some(token) = token {
            let mut value = MetadataValue::try_from(format!("Bearer {token}"))
                .map_err(|_| CaError::Answer("the node token is not printable".to_owned()))?;
            value.set_sensitive(true);
            request.metadata_mut().insert("authorization", value);
        }
        let exchange = exchange(channel, request);
        tokio::time::timeout(CALL_TIMEOUT, exchange).await.map_err(|_| CaError::Timeout)?
    }

    fn lock_token(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Issuer for CaClient {
    fn issue(
        &self,
        identity: Identity,
        csr: String,
        own: Option<Arc<ClientCertificate>>,
    ) -> BoxFuture<'_, Result<Vec<String>, CaError>> {
        Box::pin(self.certificate(identity, csr, own))
    }
}

fn may_be_our_certificate(error: &CaError) -> bool {
    match error {
        CaError::Refused { code, .. } => {
            // A rejected client certificate ends the connection instead of giving a status.
            matches!(code, Code::Unauthenticated | Code::Unavailable | Code::Unknown)
        }
        CaError::Channel(ChannelError::Tls { .. } | ChannelError::Own(_)) => true,
        _ => false,
    }
}

async fn exchange(
    channel: Channel,
    request: Request<IstioCertificateRequest>,
) -> Result<Vec<String>, CaError> {
    let refused = |status: tonic::Status| CaError::Refused {
        code: status.code(),
        message: match std::error::Error::source(&status) {
            Some(source) => channel::explain(source),
            None => status.message().to_owned(),
        },
    };
    let mut grpc = Grpc::new(channel);
    grpc.ready()
        .await
        .map_err(|e| CaError::Refused { code: Code::Unavailable, message: channel::explain(&e) })?;
    let codec = ProstCodec::<IstioCertificateRequest, IstioCertificateResponse>::default();
    let path = PathAndQuery::from_static(xds::CREATE_CERTIFICATE_PATH);
    let response = grpc.unary(request, path, codec).await.map_err(refused)?;
    Ok(response.into_inner().cert_chain)
}
