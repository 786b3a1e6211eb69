//! A GPU that fails under a port: every lane ends with the driver's words, those that had nothing on their way by their next op.

mod machine;
mod pair;

use crossdock_cuda::{Gpu, fake};
use crossdock_transport::{DownCause, Error, Event, Port};
use pair::Pair;

const DEVICE: u32 = 6;
const ILLEGAL_ADDRESS: i32 = 700;

#[test]
fn lanes_of_a_lost_gpu_end() {
    if machine::is_skipped_on_a_gpu() {
        return;
    }
    let gpu = Gpu::open(&fake::driver(), DEVICE).unwrap();
    let mut pair = Pair::new(&gpu, 2);
    pair.write(1);
    fake::spoil(DEVICE, ILLEGAL_ADDRESS);
    // The first lane has a page on its way, or is refused one; the other hears of it when it is asked.
    for lane in [0, 1] {
        let [end, _] = pair.lanes[lane];
        let posted = pair.post(lane, 2 + lane as u32);
        assert!(matches!(&posted, Ok(posted) if posted.ops == 1) || lane_is_down(&posted), "{posted:?}");
        let mut cause = None;
        pair.until("the lane ends", |at, event| match event {
            Event::Down { lane, cause: why } if at == 0 && lane == end => {
                cause = Some(why);
                true
            }
            Event::Done { token, .. } => panic!("{token:?} is not done"),
            Event::Arrived { imm, .. } => panic!("{imm} has not arrived"),
            _ => false,
        });
        assert!(
            matches!(cause, Some(DownCause::Driver { code: ILLEGAL_ADDRESS, .. })),
            "lane {lane}: {cause:?}"
        );
        assert!(lane_is_down(&pair.post(lane, 9)));
    }
    let mut arms = pair.ports.iter_mut().map(|port| format!("{:?}", port.arm()));
    assert!(arms.all(|arm| arm.starts_with("Sleep")), "nothing is left that has to be polled");
}

fn lane_is_down<T>(posted: &Result<T, Error>) -> bool {
    matches!(posted, Err(Error::LaneDown { .. }))
}
