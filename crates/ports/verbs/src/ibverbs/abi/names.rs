// What `sys.rs` has, for the test that compares it with a table and for the program that prints the table. In brackets:
// what ibverbs-sys calls it.
names! {
    structs {
        ibv_device { _ops node_type transport_type name dev_name dev_path ibdev_path }
        ibv_context { device ops cmd_fd async_fd num_comp_vectors mutex abi_compat }
        ibv_context_ops {
            _compat_query_device _compat_query_port _compat_alloc_pd _compat_dealloc_pd _compat_reg_mr
            _compat_rereg_mr _compat_dereg_mr alloc_mw bind_mw dealloc_mw _compat_create_cq poll_cq
            req_notify_cq _compat_cq_event _compat_resize_cq _compat_destroy_cq _compat_create_srq
            _compat_modify_srq _compat_query_srq _compat_destroy_srq post_srq_recv _compat_create_qp
            _compat_query_qp _compat_modify_qp _compat_destroy_qp post_send post_recv _compat_create_ah
            _compat_destroy_ah _compat_attach_mcast _compat_detach_mcast _compat_async_event
        }
        ibv_device_attr {
            fw_ver node_guid sys_image_guid max_mr_size page_size_cap vendor_id vendor_part_id hw_ver
            max_qp max_qp_wr device_cap_flags max_sge max_sge_rd max_cq max_cqe max_mr max_pd
            max_qp_rd_atom max_ee_rd_atom max_res_rd_atom max_qp_init_rd_atom max_ee_init_rd_atom
            atomic_cap max_ee max_rdd max_mw max_raw_ipv6_qp max_raw_ethy_qp max_mcast_grp
            max_mcast_qp_attach max_total_mcast_qp_attach max_ah max_fmr max_map_per_fmr max_srq max_srq_wr
            max_srq_sge max_pkeys local_ca_ack_delay phys_port_cnt
        }
        ibv_port_attr {
            state max_mtu active_mtu gid_tbl_len port_cap_flags max_msg_sz bad_pkey_cntr qkey_viol_cntr
            pkey_tbl_len lid sm_lid lmc max_vl_num sm_sl subnet_timeout init_type_reply active_width
            active_speed phys_state link_layer flags port_cap_flags2 active_speed_ex
        }
        ibv_gid { raw }
        ibv_gid_entry { gid gid_index port_num gid_type ndev_ifindex }
        ibv_pd { context handle }
        ibv_mr { context pd addr length handle lkey rkey }
        ibv_comp_channel { context fd refcnt }
        ibv_cq {
            context channel cq_context handle cqe mutex cond comp_events_completed async_events_completed
        }
        ibv_wc {
            wr_id status opcode vendor_err byte_len imm_data [__bindgen_anon_1.imm_data] qp_num src_qp
            wc_flags pkey_index slid sl dlid_path_bits
        }
        ibv_srq { context srq_context pd handle mutex cond events_completed }
        ibv_srq_init_attr { srq_context attr }
        ibv_srq_attr { max_wr max_sge srq_limit }
        ibv_qp {
            context qp_context pd send_cq recv_cq srq handle qp_num state qp_type mutex cond
            events_completed
        }
        ibv_qp_init_attr { qp_context send_cq recv_cq srq cap qp_type sq_sig_all }
        ibv_qp_cap { max_send_wr max_recv_wr max_send_sge max_recv_sge max_inline_data }
        ibv_qp_attr {
            qp_state cur_qp_state path_mtu path_mig_state qkey rq_psn sq_psn dest_qp_num qp_access_flags
            cap ah_attr alt_ah_attr pkey_index alt_pkey_index en_sqd_async_notify sq_draining max_rd_atomic
            max_dest_rd_atomic min_rnr_timer port_num timeout retry_cnt rnr_retry alt_port_num alt_timeout
            rate_limit
        }
        ibv_ah_attr { grh dlid sl src_path_bits static_rate is_global port_num }
        ibv_global_route { dgid flow_label sgid_index hop_limit traffic_class }
        ibv_sge { addr length lkey }
        ibv_send_wr {
            wr_id next sg_list num_sge opcode send_flags imm_data [__bindgen_anon_1.imm_data] wr qp_type
            _bind_mw [__bindgen_anon_2]
        }
        ibv_send_wr_wr { rdma _atomic [atomic] }
        ibv_send_wr_rdma { remote_addr rkey }
        ibv_recv_wr { wr_id next sg_list num_sge }
        ibv_async_event { element event_type }
        ibv_async_event_element { cq qp srq port_num }
    }
    constants {
        IBV_NODE_UNKNOWN IBV_NODE_CA IBV_NODE_SWITCH IBV_NODE_ROUTER IBV_NODE_RNIC IBV_NODE_USNIC
        IBV_NODE_USNIC_UDP IBV_NODE_UNSPECIFIED
        IBV_TRANSPORT_UNKNOWN IBV_TRANSPORT_IB IBV_TRANSPORT_IWARP IBV_TRANSPORT_USNIC
        IBV_TRANSPORT_USNIC_UDP IBV_TRANSPORT_UNSPECIFIED
        IBV_PORT_NOP IBV_PORT_DOWN IBV_PORT_INIT IBV_PORT_ARMED IBV_PORT_ACTIVE IBV_PORT_ACTIVE_DEFER
        IBV_MTU_256 IBV_MTU_512 IBV_MTU_1024 IBV_MTU_2048 IBV_MTU_4096
        IBV_LINK_LAYER_UNSPECIFIED IBV_LINK_LAYER_INFINIBAND IBV_LINK_LAYER_ETHERNET
        IBV_QPF_GRH_REQUIRED [IB_UVERBS_QPF_GRH_REQUIRED]
        IBV_GID_TYPE_IB IBV_GID_TYPE_ROCE_V1 IBV_GID_TYPE_ROCE_V2
        IBV_ACCESS_LOCAL_WRITE IBV_ACCESS_REMOTE_WRITE IBV_ACCESS_REMOTE_READ IBV_ACCESS_REMOTE_ATOMIC
        IBV_ACCESS_RELAXED_ORDERING IBV_ACCESS_OPTIONAL_RANGE [IB_UVERBS_ACCESS_OPTIONAL_RANGE]
        IBV_WC_SUCCESS IBV_WC_LOC_LEN_ERR IBV_WC_LOC_QP_OP_ERR IBV_WC_LOC_EEC_OP_ERR IBV_WC_LOC_PROT_ERR
        IBV_WC_WR_FLUSH_ERR IBV_WC_MW_BIND_ERR IBV_WC_BAD_RESP_ERR IBV_WC_LOC_ACCESS_ERR
        IBV_WC_REM_INV_REQ_ERR IBV_WC_REM_ACCESS_ERR IBV_WC_REM_OP_ERR IBV_WC_RETRY_EXC_ERR
        IBV_WC_RNR_RETRY_EXC_ERR IBV_WC_LOC_RDD_VIOL_ERR IBV_WC_REM_INV_RD_REQ_ERR IBV_WC_REM_ABORT_ERR
        IBV_WC_INV_EECN_ERR IBV_WC_INV_EEC_STATE_ERR IBV_WC_FATAL_ERR IBV_WC_RESP_TIMEOUT_ERR
        IBV_WC_GENERAL_ERR IBV_WC_TM_ERR IBV_WC_TM_RNDV_INCOMPLETE
        IBV_WC_SEND IBV_WC_RDMA_WRITE IBV_WC_RDMA_READ IBV_WC_RECV IBV_WC_RECV_RDMA_WITH_IMM
        IBV_WC_GRH IBV_WC_WITH_IMM
        IBV_QPT_RC
        IBV_QP_STATE IBV_QP_CUR_STATE IBV_QP_EN_SQD_ASYNC_NOTIFY IBV_QP_ACCESS_FLAGS IBV_QP_PKEY_INDEX
        IBV_QP_PORT IBV_QP_QKEY IBV_QP_AV IBV_QP_PATH_MTU IBV_QP_TIMEOUT IBV_QP_RETRY_CNT IBV_QP_RNR_RETRY
        IBV_QP_RQ_PSN IBV_QP_MAX_QP_RD_ATOMIC IBV_QP_ALT_PATH IBV_QP_MIN_RNR_TIMER IBV_QP_SQ_PSN
        IBV_QP_MAX_DEST_RD_ATOMIC IBV_QP_PATH_MIG_STATE IBV_QP_CAP IBV_QP_DEST_QPN IBV_QP_RATE_LIMIT
        IBV_QPS_RESET IBV_QPS_INIT IBV_QPS_RTR IBV_QPS_RTS IBV_QPS_SQD IBV_QPS_SQE IBV_QPS_ERR
        IBV_QPS_UNKNOWN
        IBV_WR_RDMA_WRITE IBV_WR_RDMA_WRITE_WITH_IMM IBV_WR_SEND IBV_WR_SEND_WITH_IMM IBV_WR_RDMA_READ
        IBV_SEND_FENCE IBV_SEND_SIGNALED IBV_SEND_SOLICITED IBV_SEND_INLINE
        IBV_EVENT_CQ_ERR IBV_EVENT_QP_FATAL IBV_EVENT_QP_REQ_ERR IBV_EVENT_QP_ACCESS_ERR IBV_EVENT_COMM_EST
        IBV_EVENT_SQ_DRAINED IBV_EVENT_PATH_MIG IBV_EVENT_PATH_MIG_ERR IBV_EVENT_DEVICE_FATAL
        IBV_EVENT_PORT_ACTIVE IBV_EVENT_PORT_ERR IBV_EVENT_LID_CHANGE IBV_EVENT_PKEY_CHANGE
        IBV_EVENT_SM_CHANGE IBV_EVENT_SRQ_ERR IBV_EVENT_SRQ_LIMIT_REACHED IBV_EVENT_QP_LAST_WQE_REACHED
        IBV_EVENT_CLIENT_REREGISTER IBV_EVENT_GID_CHANGE IBV_EVENT_WQ_FATAL
    }
}
