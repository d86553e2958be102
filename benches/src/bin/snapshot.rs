//! What one endpoint change among 100,000 workloads costs: time and memory of `Snapshot::with`.
//!
//! The bar is DESIGN's second invariant: at most 1 ms and 1 MB. The program fails when it is missed.
//! Memory is what the allocator was asked for, counted here, not what the system says.

use std::alloc::{GlobalAlloc, Layout, System};
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::ensure;
use meshload::hist::Histogram;
use meshload::lines;
use model::{
    AppProtocol, Change, FamilyPolicy, Health, LoadBalancing, Service, ServiceKey, ServicePort,
    Snapshot, Str, TunnelProtocol, Vip, Workload,
};
use serde_json::json;

const WORKLOADS: u32 = 100_000;
/// Each workload serves in one Service; ten to a Service, as a mesh of many small applications has it.
const PER_SERVICE: u32 = 10;
/// One Service with very many endpoints: the worst case for a change of one of them.
const LARGE_SERVICE: u32 = 10_000;
const CHANGES: u32 = 2_000;
const TIME_BAR: Duration = Duration::from_millis(1);
const MEMORY_BAR: u64 = 1_000_000;

/// The system's allocator, counting.
struct Counting;

/// Bytes ever asked for.
static ASKED: AtomicU64 = AtomicU64::new(0);
/// Bytes in use.
static HELD: AtomicI64 = AtomicI64::new(0);

#[expect(unsafe_code, reason = "an allocator that counts has to be one")]
// SAFETY: every call goes to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ASKED.fetch_add(layout.size() as u64, Ordering::Relaxed);
        HELD.fetch_add(size(layout), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        HELD.fetch_sub(size(layout), Ordering::Relaxed);
        // SAFETY: the caller's promise is passed on.
        unsafe { System.dealloc(ptr, layout) }
    }
}

fn size(layout: Layout) -> i64 {
    i64::try_from(layout.size()).unwrap_or(i64::MAX)
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn main() -> anyhow::Result<()> {
    let before = HELD.load(Ordering::Relaxed);
    let began = Instant::now();
    let mut snapshot = build();
    let build_time = began.elapsed();
    let held = HELD.load(Ordering::Relaxed) - before;
    let small =
        measure(&mut snapshot, |change| change.wrapping_mul(7919) % (WORKLOADS - LARGE_SERVICE));
    let large =
        measure(&mut snapshot, |change| WORKLOADS - 1 - change.wrapping_mul(7919) % LARGE_SERVICE);
    lines::line(&json!({
        "event": "result",
        "workloads": WORKLOADS,
        "build_seconds": build_time.as_secs_f64(),
        "snapshot_bytes": held,
        "snapshot_bytes_per_workload": held / i64::from(WORKLOADS),
        "changes": CHANGES,
        "service_of_10": small.json(),
        "service_of_10000": large.json(),
    }))?;
    for measured in [small, large] {
        let p99 = Duration::from_nanos(measured.time.quantile(0.99));
        ensure!(
            p99 <= TIME_BAR,
            "one change takes {p99:?} at the 99th percentile: the bar is {TIME_BAR:?}"
        );
        ensure!(
            measured.most <= MEMORY_BAR,
            "one change asks for {} bytes: the bar is {MEMORY_BAR}",
            measured.most
        );
    }
    Ok(())
}

struct Measured {
    time: Histogram,
    asked: u64,
    most: u64,
}

impl Measured {
    fn json(&self) -> serde_json::Value {
        json!({
            "time": self.time.quantiles(),
            "bytes_mean": self.asked / u64::from(CHANGES),
            "bytes_max": self.most,
        })
    }
}

/// Flips the health of one workload after another. The old snapshot is dropped outside the measured
/// time, as the proxies do it on another thread.
fn measure(snapshot: &mut Snapshot, pick: impl Fn(u32) -> u32) -> Measured {
    let mut measured = Measured { time: Histogram::default(), asked: 0, most: 0 };
    for change in 0..CHANGES {
        let mut changed = workload(pick(change));
        changed.health = if change % 2 == 0 { Health::Unhealthy } else { Health::Healthy };
        changed.capacity = change + 2;
        let change = [Change::SetWorkload(Arc::new(changed))];
        let asked = ASKED.load(Ordering::Relaxed);
        let began = Instant::now();
        let next = snapshot.with(change);
        let took = began.elapsed();
        let bytes = ASKED.load(Ordering::Relaxed) - asked;
        measured.time.record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
        measured.asked += bytes;
        measured.most = measured.most.max(bytes);
        *snapshot = next;
    }
    measured
}

fn build() -> Snapshot {
    let services = (0..=(WORKLOADS - LARGE_SERVICE) / PER_SERVICE)
        .map(|n| Change::SetService(Arc::new(service(n))));
    let workloads = (0..WORKLOADS).map(|n| Change::SetWorkload(Arc::new(workload(n))));
    Snapshot::default().with(services.chain(workloads))
}

fn service_of(workload: u32) -> u32 {
    workload.min(WORKLOADS - LARGE_SERVICE) / PER_SERVICE
}

fn service_key(n: u32) -> ServiceKey {
    ServiceKey {
        namespace: "bench".into(),
        hostname: format!("svc-{n}.bench.svc.cluster.local").into(),
    }
}

fn ports() -> Arc<[ServicePort]> {
    Arc::new([ServicePort {
        service_port: 80,
        target_port: 8080,
        app_protocol: AppProtocol::Unknown,
    }])
}

fn service(n: u32) -> Service {
    Service {
        key: service_key(n),
        name: format!("svc-{n}").into(),
        vips: Arc::new([Vip { network: "".into(), ip: ip(11, n), prefix: 32 }]),
        ports: ports(),
        subject_alt_names: Arc::new([]),
        waypoint: None,
        load_balancing: LoadBalancing::default(),
        families: FamilyPolicy::default(),
    }
}

fn workload(n: u32) -> Workload {
    let name: Str = format!("pod-{n}").into();
    Workload {
        addresses: Arc::new([ip(10, n)]),
        node: format!("node-{}", n % 1000).into(),
        service_account: format!("account-{}", n % 100).into(),
        protocol: TunnelProtocol::Hbone,
        services: Arc::new([(service_key(service_of(n)), ports())]),
        ..Workload::named(format!("Kubernetes//Pod/bench/{name}"), "bench", name)
    }
}

fn ip(first: u8, n: u32) -> IpAddr {
    Ipv4Addr::from_bits(u32::from(first) << 24 | n).into()
}
