//! The certificate call: who calls, may they have it, sign it. The decisions are in [`crate::authorize`].

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::HeaderMap;
use model::Identity;
use tonic::{Code, Status};
use xds::IMPERSONATED_IDENTITY;
use xds::ca::{IstioCertificateRequest, IstioCertificateResponse};

use crate::authorize::{Caller, Refused, Subject, may_sign, node_dns_name};
use crate::ca::pem;
use crate::control::{Control, Peer};
use crate::csr::{Csr, CsrError};
use crate::login::{Login, login};
use crate::signer::{Issued, LeafRequest, SignError};

/// A pod and its proxy can be quicker than the file that tells us about the pod: a request that would be
/// refused for want of a pod waits this long for one. The file watch needs a tenth of it.
pub(crate) const POD_GRACE: Duration = Duration::from_secs(1);
/// A CSR has at most 16 KiB, see [`crate::csr::MAX_CSR`]; the rest are names.
pub(crate) const MAX_REQUEST: usize = 32 * 1024;

/// Why there is no certificate. `code` labels the metric.
#[derive(Debug, thiserror::Error)]
enum NoCertificate {
    #[error(transparent)]
    Refused(#[from] Refused),
    #[error(transparent)]
    Csr(#[from] CsrError),
    #[error(transparent)]
    Sign(#[from] SignError),
}

impl NoCertificate {
    fn code(&self) -> &'static str {
        match self {
            Self::Refused(refused) => refused.code(),
            Self::Csr(CsrError::OtherIdentity { .. }) => "csr_other_identity",
            Self::Csr(_) => "csr_unacceptable",
            Self::Sign(SignError::NotValidNow(_)) => "ca_not_valid_now",
            Self::Sign(SignError::Failed(_)) => "ca_failed",
        }
    }

    fn status(&self) -> Status {
        let code = match self {
            Self::Refused(refused) if refused.is_unauthenticated() => Code::Unauthenticated,
            Self::Refused(Refused::MalformedIdentity(_)) | Self::Csr(_) => Code::InvalidArgument,
            Self::Refused(_) => Code::PermissionDenied,
            // The caller did nothing wrong and may try again.
            Self::Sign(_) => Code::Unavailable,
        };
        Status::new(code, self.to_string())
    }
}

/// Serves one call.
pub(crate) async fn create_certificate(
    control: &Arc<Control>,
    peer: &Peer,
    headers: &HeaderMap,
    request: IstioCertificateRequest,
) -> Result<IstioCertificateResponse, Status> {
    decide_and_sign(control, peer, headers, &request).await.map_err(|error| {
        control.metrics.refused(error.code());
        tracing::warn!(peer = %peer.address, reason = error.code(), "no certificate: {error}");
        error.status()
    })
}

async fn decide_and_sign(
    control: &Arc<Control>,
    peer: &Peer,
    headers: &HeaderMap,
    request: &IstioCertificateRequest,
) -> Result<IstioCertificateResponse, NoCertificate> {
    let now = SystemTime::now();
    let Login { caller, token } = login(control, peer, headers, now)?;
    let requested = impersonated(request)?;
    let subject = allowed(control, &caller, requested.as_ref()).await?;
    let csr = Csr::parse(&request.csr)?;
    csr.check_names(subject.identity())?;
    let issued = sign(control, &subject, csr, request.validity_duration, now).await?;
    if let (Caller::Token { .. }, Some(token)) = (&caller, token) {
        // Last of all, so that no mistake costs the token. Of two callers that race with it, one gets
        // its certificate; that of the other is dropped here.
        control.tokens().redeem(token).ok_or(Refused::UnknownToken)?;
    }
    control.metrics.issued(subject.kind());
    tracing::info!(
        node = %caller.node(), pod = caller.pod().map(tracing::field::display), peer = %peer.address, identity = %subject.identity(),
        serial = issued.serial, "certificate issued"
    );
    let chain = issued.chain.iter().chain(&issued.roots);
    Ok(IstioCertificateResponse { cert_chain: chain.map(|der| pem("CERTIFICATE", der)).collect() })
}

/// The decision; waits a little for a pod that we have not heard of yet.
async fn allowed(
    control: &Control,
    caller: &Caller,
    requested: Option<&Identity>,
) -> Result<Subject, Refused> {
    let mut latest = control.latest.clone();
    let decide = |latest: &crate::world::Latest| {
        let none = compile::PodsOnNodes::new();
        let pods = latest.world.as_ref().map_or(&none, |world| &*world.pods);
        may_sign(caller, requested, &control.mesh.trust_domain, pods)
    };
    let decided = decide(&latest.borrow_and_update());
    if !matches!(decided, Err(Refused::NoPodOnNode { .. })) {
        return decided;
    }
    let changed = latest.wait_for(|latest| decide(latest).is_ok());
    match tokio::time::timeout(POD_GRACE, changed).await {
        Ok(Ok(latest)) => decide(&latest),
        // Time is up, or the process ends.
        _ => decided,
    }
}

async fn sign(
    control: &Control,
    subject: &Subject,
    csr: Csr,
    validity: i64,
    now: SystemTime,
) -> Result<Issued, SignError> {
    let wished = u64::try_from(validity).ok().filter(|s| *s > 0).map(Duration::from_secs);
    let dns_names = match subject {
        Subject::Proxy { node, .. } => vec![node_dns_name(node)],
        Subject::Workload { .. } => vec![],
    };
    let leaf = LeafRequest {
        public_key: csr.public_key,
        identity: subject.identity().clone(),
        dns_names,
        addresses: vec![],
        lifetime: wished.unwrap_or(control.leaf_ttl).min(control.leaf_ttl),
    };
    control.signer.sign(leaf, now).await
}

fn impersonated(request: &IstioCertificateRequest) -> Result<Option<Identity>, Refused> {
    use prost_types::value::Kind;
    let field = request.metadata.as_ref().and_then(|m| m.fields.get(IMPERSONATED_IDENTITY));
    match field.map(|value| &value.kind) {
        None => Ok(None),
        Some(Some(Kind::StringValue(uri))) => {
            let identity = uri.parse::<Identity>();
            identity.map(Some).map_err(|e| Refused::MalformedIdentity(e.to_string()))
        }
        // Not "none asked for": that would answer a garbled question with a more powerful certificate.
        Some(_) => {
            Err(Refused::MalformedIdentity(format!("{IMPERSONATED_IDENTITY} is not a string")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost_types::{Struct, Value, value::Kind};

    #[test]
    fn impersonated_identities() {
        let check = |kind: Option<Kind>, want: Result<Option<&str>, &str>| {
            let field = (IMPERSONATED_IDENTITY.to_owned(), Value { kind });
            let metadata = Some(Struct { fields: [field].into() });
            let request = IstioCertificateRequest { metadata, ..Default::default() };
            let got = impersonated(&request).map(|i| i.map(|i| i.to_string()));
            assert_eq!(got.as_ref().map(Option::as_deref).map_err(|e| e.code()), want);
        };
        let web = "spiffe://td/ns/shop/sa/web";
        check(Some(Kind::StringValue(web.into())), Ok(Some(web)));
        check(Some(Kind::StringValue("".into())), Err("malformed_identity"));
        check(
            Some(Kind::StringValue("spiffe://td/ns/shop/sa/web/x".into())),
            Err("malformed_identity"),
        );
        check(Some(Kind::BoolValue(true)), Err("malformed_identity"));
        check(None, Err("malformed_identity"));
        assert_eq!(impersonated(&IstioCertificateRequest::default()), Ok(None));
    }
}
